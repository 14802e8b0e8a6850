"""Sources of a loss's hidden vectors, chunk by chunk, which also receive their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """The hidden vectors ``(N, d)`` in one pass over the chunks: forward, then backward if a gradient is needed."""

    def forward(self, chunk: slice) -> Tensor:
        """Return the chunk's hidden vectors ``(c, d)``."""

    def backward(self, chunk: slice, cotangent: Tensor) -> None:
        """Backpropagate the chunk's gradient ``(c, d)``, in any dtype, to the source tensors."""

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of the source tensors once all chunks are done; None where not needed."""


class RowSource(NamedTuple):
    """Hidden vectors ``(…, d)``, given by the tensors that they are computed from.

    ``make(needed, *tensors)`` returns the rows of one pass; ``needed`` says which gradients are wanted. The tensors
    become inputs of the autograd Function, and ``make`` must hold none that is differentiated. ``random``: making the
    rows may draw random numbers, so that a second pass must replay the first.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: tuple[Tensor, ...]
    make: Callable[..., Rows]
    random: bool = False

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


class WholeRows:
    """Takes rows from one tensor ``(…, d)``."""

    def __init__(self, needed: Sequence[bool], hidden: Tensor) -> None:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None

    def forward(self, chunk: slice) -> Tensor:
        return self.hidden[chunk]

    def backward(self, chunk: slice, cotangent: Tensor) -> None:
        assert self.gradient is not None
        self.gradient.view(self.hidden.shape)[chunk] = cotangent

    def gradients(self) -> list[Tensor | None]:
        return [self.gradient]
