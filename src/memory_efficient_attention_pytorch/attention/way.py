"""The interface of a way of computing attention. Each way is a module; ``decision`` lists them and chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .bias import BiasGradient
from .request import AttentionRequest

OF_SCORE = "a function of the score needs the scores themselves, which it keeps inside"


class BackwardInputs(NamedTuple):
    """The inputs of backward: the arguments and results of forward, their gradients, and the sum for the bias's.

    out, grad_out: ``(b, h, n, e)``. lse, grad_lse: ``(b, h, n)``. state: what forward returned besides out and lse.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    state: Sequence[Tensor]
    grad_out: Tensor
    grad_lse: Tensor | None
    bias_gradient: BiasGradient

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.out, self.lse, *self.state, self.grad_out, self.grad_lse


class Way(ABC):
    """One way of computing attention.

    name, backend: its own name and that of its kind; either may be asked for. merit: why it is preferred where it is.
    by_autograd: autograd differentiates :meth:`forward`, and :meth:`backward` is not used.
    """

    name: str
    backend: str
    merit: str
    by_autograd = False

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Return why this way cannot compute the request; None if it can."""
        return None

    def drawback(self, request: AttentionRequest) -> str | None:
        """Return why another way is preferred unless this one is asked for by name; None if none is."""
        return None

    @abstractmethod
    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Compute the output ``(b, h, n, e)`` in v's dtype, the log-sum-exp ``(b, h, n)`` and state for backward."""

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        """Compute the gradients of q, k and v, in their dtypes or wider; add the bias's to ``given.bias_gradient``."""
        raise NotImplementedError(f"{self.name} is differentiated by autograd")
