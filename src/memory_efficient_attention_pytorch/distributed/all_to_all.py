"""Exchange heads for tokens: each process computes attention over all tokens for some of the heads.

Jacobs et al., "DeepSpeed Ulysses", 2023, arXiv:2309.14509. Where there are fewer key/value heads than processes, each
is sent to all processes whose query heads use it. For long sequences a few heads are exchanged at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.request import AttentionRequest
from ..attention.tiles import Tiled, empty_results
from ..attention.visibility import Block
from ..attention.way import BackwardInputs, Way
from .exchange import Layout, all_to_all

AT_ONCE = {"cpu": 2**24}
"""Working set in bytes between two exchanges: queries, keys, values, output and their cotangents."""
AT_ONCE_ELSEWHERE = 2**28


class AllToAll(Way):
    """Computes tiles after an exchange of heads for tokens.

    A process holds its own tokens of all heads, and all tokens of the heads of the current exchange.
    """

    name, backend = "all_to_all", "all_to_all"
    merit = "heads are exchanged for tokens"

    def __init__(self, within: Tiled, layout: Layout, group: dist.ProcessGroup) -> None:
        self.within, self.layout, self.group, self.rank = within, layout, group, group.rank()

    @staticmethod
    def refusal(h: int, kv: int, size: int) -> str | None:
        """Return why ``h`` query and ``kv`` key/value heads cannot be exchanged among ``size`` processes, or None."""
        if h % size == 0 and 0 in (kv % size, size % kv):
            return None
        return f"{h} query heads and {kv} key/value heads do not divide among {size} processes"

    @classmethod
    def adds_little(cls, request: AttentionRequest, size: int) -> bool:
        """Return whether exchanges add little to the memory that a process needs for these heads anyway.

        Their queries, keys, values, outputs and cotangents take as much for its own tokens as for all tokens of its
        share of the heads. So where the share comes in several exchanges each adds at most half of that; one that
        brings the whole share must be small. Only what all processes know decides.
        """
        count, held = cls._exchanges(request, size)
        return count > 1 or held <= _at_once(request)

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        # Padding tokens attend to nothing.
        block = Block(slice(0, request.h), slice(0, q.shape[2]), slice(0, 0))
        results = empty_results(replace(request, block=block), v)
        for turn, own in self._turns(request):
            found = self.within.forward(own, *(self._to_heads(x, turn) for x in (q, k, v)))
            for x, total in zip(found, results, strict=True):
                # A block's output comes in the compute dtype; nothing is to be added to it, and fewer bytes travel.
                for target, part in self._to_tokens(x.to(total.dtype), total, turn):
                    target.copy_(part)
        return results

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        results = [torch.zeros_like(x, dtype=request.compute_dtype) for x in (given.q, given.k, given.v)]
        for turn, own in self._turns(request):
            tensors = (given.q, given.k, given.v, given.out, given.lse)
            q, k, v, out, lse = (self._to_heads(x, turn) for x in tensors)
            state = [self._to_heads(x, turn) for x in given.state]
            grad_out = self._to_heads(given.grad_out, turn)
            grad_lse = None if given.grad_lse is None else self._to_heads(given.grad_lse, turn)
            inputs = BackwardInputs(q, k, v, out, lse, state, grad_out, grad_lse, given.bias_gradient)
            found = list(self.within.backward(own, inputs))
            del inputs, q, k, v, out, lse, state, grad_out, grad_lse
            for total in results:
                # A head that several processes had gets the sum of their parts.
                for target, part in self._to_tokens(found.pop(0), total, turn):
                    target += part
        return tuple(results)

    @staticmethod
    def _exchanges(request: AttentionRequest, size: int) -> tuple[int, int]:
        """Return the number of exchanges, as few as memory allows, and the bytes of the working set of one."""
        shares = max(1, request.kv // size)
        per_share = 2 * request.b * request.n * (request.d + request.e) * request.dtype.itemsize
        per_share *= request.h // size // shares + 1
        most = max(1, _at_once(request) // max(1, per_share))
        count = next(n for n in range(1, shares + 1) if shares % n == 0 and (shares // n <= most or n == shares))
        return count, shares // count * per_share

    def _turns(self, request: AttentionRequest) -> Iterator[tuple[tuple[int, int], AttentionRequest]]:
        """Yield (number, count) of each exchange, and the request of this process for it."""
        count, _ = self._exchanges(request, self.layout.size)
        everything = slice(0, request.n)
        for number in range(count):
            heads = self._heads(request.h, self.rank, (number, count))
            yield (number, count), replace(request, block=Block(heads, everything, everything))

    def _heads(self, heads: int, rank: int, turn: tuple[int, int]) -> slice:
        """Return the heads, of ``heads``, that a process gets in a turn: part of its share, or the one it shares."""
        number, count = turn
        size = max(1, heads // self.layout.size // count)
        first = rank * heads // self.layout.size + number * size
        return slice(first, first + size)

    def _to_heads(self, x: Tensor, turn: tuple[int, int]) -> Tensor:
        """Turn this process's tokens ``(b, h, local, …)`` into all tokens ``(b, heads, n, …)`` of the turn's heads."""
        parts = [x[:, self._heads(x.shape[1], rank, turn)] for rank in range(self.layout.size)]
        found = all_to_all(self.group, parts)
        own = x.new_empty(*parts[0].shape[:2], self.layout.num_tokens, *x.shape[3:])
        for rank, part in enumerate(found):
            for chunk in self.layout.chunks(rank):
                own[:, :, chunk] = part[:, :, self.layout.here(rank, chunk)]
        return own

    def _to_tokens(self, x: Tensor, total: Tensor, turn: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inverse: slices of ``total (b, h, local, …)`` and each process's result for them."""
        sent = x.new_empty(self.layout.size, *x.shape[:2], self.layout.local, *x.shape[3:])
        for rank, part in enumerate(sent):
            for chunk in self.layout.chunks(rank):
                part[:, :, self.layout.here(rank, chunk)] = x[:, :, chunk]
        for rank, part in enumerate(all_to_all(self.group, sent)):
            for chunk in self.layout.chunks(self.rank):
                here = self.layout.here(self.rank, chunk)
                yield total[:, self._heads(total.shape[1], rank, turn), here], part[:, :, here]


def _at_once(request: AttentionRequest) -> int:
    return AT_ONCE.get(request.device_type, AT_ONCE_ELSEWHERE)
