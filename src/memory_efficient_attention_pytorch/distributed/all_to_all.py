"""Heads exchanged for tokens: each process attends for some of the heads to all tokens.

Jacobs et al., "DeepSpeed Ulysses", 2023, arXiv:2309.14509. Where there are fewer key/value heads than processes, each
goes to all the processes whose query heads read it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.request import AttentionRequest
from ..attention.tiles import Tiled
from ..attention.visibility import Block
from ..attention.way import BackwardInputs, Way
from .exchange import Layout, all_to_all


class AllToAll(Way):
    """Memory of a process: all tokens of ``h / size`` heads, as much as its own tokens of all heads."""

    name, backend = "all_to_all", "all_to_all"
    merit = "heads exchanged for tokens travel once"

    def __init__(self, within: Tiled, layout: Layout, group: dist.ProcessGroup) -> None:
        self.within, self.layout, self.group, self.rank = within, layout, group, group.rank()

    @staticmethod
    def refusal(h: int, kv: int, size: int) -> str | None:
        """Why so many heads cannot be exchanged among so many processes."""
        if h % size == 0 and 0 in (kv % size, size % kv):
            return None
        return f"{h} query heads and {kv} key/value heads do not divide among {size} processes"

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        own = self._of_heads(request)
        found = self.within.forward(own, *(self._to_heads(x) for x in (q, k, v)))
        out, *others = (
            self._to_tokens(x, x.new_zeros((*x.shape[:1], request.h, *q.shape[2:3], *x.shape[3:]))) for x in found
        )
        lse, *rest = others
        for number, chunk in enumerate(self.layout.chunks(self.rank)):
            # What fills a chunk up sees nothing.
            seen = number * self.layout.chunk + chunk.stop - chunk.start
            lse[:, :, seen : (number + 1) * self.layout.chunk] = float("-inf")
        return out.to(v.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse, *rest

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        own = self._of_heads(request)
        tensors = (given.q, given.k, given.v, given.out, given.lse)
        q, k, v, out, lse = (self._to_heads(x) for x in tensors)
        state = [self._to_heads(x) for x in given.state]
        grad_out = self._to_heads(given.grad_out)
        grad_lse = None if given.grad_lse is None else self._to_heads(given.grad_lse)
        found = self.within.backward(
            own, BackwardInputs(q, k, v, out, lse, state, grad_out, grad_lse, given.bias_gradient)
        )
        pairs = zip(found, (given.q, given.k, given.v), strict=True)
        dtype = request.compute_dtype
        return tuple(self._to_tokens(x.to(dtype), torch.zeros_like(like, dtype=dtype)) for x, like in pairs)

    def _of_heads(self, request: AttentionRequest) -> AttentionRequest:
        everything = slice(0, request.n)
        return replace(request, block=Block(self._heads(request.h, self.rank), everything, everything))

    def _heads(self, heads: int, rank: int) -> slice:
        """Those of ``heads`` heads that a process gets: a share of them, or the one that its share is within."""
        first = rank * heads // self.layout.size
        return slice(first, first + max(1, heads // self.layout.size))

    def _to_heads(self, x: Tensor) -> Tensor:
        """``(b, h, local, …)`` of this process's tokens → ``(b, heads, n, …)`` of its heads."""
        parts = [x[:, self._heads(x.shape[1], rank)] for rank in range(self.layout.size)]
        return torch.cat(all_to_all(self.group, parts), dim=2)[:, :, self.layout.places(x.device)]

    def _to_tokens(self, x: Tensor, total: Tensor) -> Tensor:
        """The inverse, added to ``total (b, h, local, …)``: of a head that several processes had, all parts."""
        everywhere = x.new_zeros((*x.shape[:2], self.layout.size * self.layout.local, *x.shape[3:]))
        everywhere[:, :, self.layout.places(x.device)] = x
        parts = all_to_all(self.group, everywhere.split(self.layout.local, dim=2))
        for rank, part in enumerate(parts):
            total[:, self._heads(total.shape[1], rank)] += part
        return total
