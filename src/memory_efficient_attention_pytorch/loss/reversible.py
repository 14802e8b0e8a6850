"""Rows of a reversible language model's loss: the sum of its two streams, normed, a chunk of tokens at a time.

Neither the sum of the streams nor its norm exists as a whole. Besides the first stream and the last step's other input,
which reversal needs anyway, only the gradient of the sum is kept for backward; where gradients wait for backward, it is
the second stream instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..common.gradients import GradientSums, fresh_total
from ..common.parameters import SeenParameters
from ..recompute.reversal import Chain, ChainEnd
from .rows import RowSource


def normed_sum(norm: nn.Module, chain: Chain, y1: Tensor, y2: Tensor) -> RowSource:
    """Return rows ``norm(y1 + y2)`` of :meth:`ReversibleSequence.streams` ``(b, n, d)``; the norm is token-wise."""
    seen = SeenParameters([norm])
    tensors = (ChainEnd.apply(chain, True, y1, y2), y2.detach(), *seen.take())
    return RowSource(y1.shape, chain.dtype, tensors, partial(_NormedSum, norm, seen, chain.dtype), random=True)


class _NormedSum:
    """Computes rows ``norm(y1 + y2)``; their gradient passes through the norm to the sum, represented by y1."""

    def __init__(
        self, norm: nn.Module, seen: SeenParameters, dtype: torch.dtype, needed: Sequence[bool], *tensors: Tensor
    ) -> None:
        y1, y2, *parameters = tensors
        self.streams = y1.flatten(0, -2), y2.flatten(0, -2)
        self.norm, self.seen, self.dtype = norm, seen, dtype
        self.needs_graph = any(needed)
        self.leaves = seen.leaves(parameters, needed[2:])
        self.of_norm = GradientSums(self.leaves, needed[2:], fresh_total)
        self.of_sum = torch.empty_like(y1, memory_format=torch.contiguous_format) if needed[0] else None

    def forward(self, chunk: slice) -> Tensor:
        first, second = (stream[chunk] for stream in self.streams)
        self.sum = (first + second).to(self.dtype).requires_grad_(self.of_sum is not None)
        with torch.set_grad_enabled(self.needs_graph), self.seen.held(self.leaves):
            self.normed = self.norm(self.sum)
        normed: Tensor = self.normed.detach()
        return normed

    def backward(self, chunk: slice, cotangent: Tensor) -> None:
        (found,) = self.of_norm.backward(self.normed, cotangent.to(self.normed.dtype), [self.sum])
        if self.of_sum is not None:
            assert found is not None  # known norms depend on their input
            self.of_sum.flatten(0, -2)[chunk] = found
        del self.sum, self.normed

    def gradients(self) -> list[Tensor | None]:
        return [self.of_sum, None, *self.of_norm.results]
