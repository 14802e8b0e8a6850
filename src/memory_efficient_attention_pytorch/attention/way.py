"""What every way of computing attention offers. Each is one module; ``decision`` has the list and chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .bias import BiasGradient
from .request import AttentionRequest
from .tiles import Saved, Upstream


class Way(ABC):
    """One way of computing attention.

    name: by which it may be asked for. backend: the kind that it is of, by which it may be asked for, too. merit: why
    it is preferred where it is. by_autograd: PyTorch differentiates what :meth:`forward` does, and there is nothing
    that could be kept for :meth:`backward`.
    """

    name: str
    backend: str
    merit: str
    by_autograd = False

    @abstractmethod
    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why it cannot compute this; None when it can."""

    def drawback(self, request: AttentionRequest) -> str | None:
        """Why another way that can is preferred unless this one is asked for by name; None where none is."""
        return None

    @abstractmethod
    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Output ``(b, h, n, e)`` in v's dtype, log-sum-exp ``(b, h, n)``, and what else backward asks for."""

    def backward(
        self, request: AttentionRequest, saved: Saved, upstream: Upstream, bias_gradient: BiasGradient
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, in their dtypes or wider; that of the bias goes to ``bias_gradient``."""
        raise NotImplementedError(f"{self.name} is differentiated by autograd")
