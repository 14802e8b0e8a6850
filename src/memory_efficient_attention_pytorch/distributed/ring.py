"""Keys and values go round: each process attends with its own queries to a part of the keys at a time.

What is found for the parts is merged by log-sum-exp, as tiles are (Liu et al., "Ring attention", 2023,
arXiv:2310.01889). In step s a process sends to the one s places on, so that what a window hides is never sent; the next
step's keys travel while this step's are computed. In backward the gradients of a part return to its owner likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.request import AttentionRequest
from ..attention.tiles import LogSumExp, Tiled, merge
from ..attention.visibility import Block
from ..attention.way import BackwardInputs, Way
from .exchange import Layout, Transfer


class Part(NamedTuple):
    """Keys and values that a process needs of one chunk, and where they stand in the whole."""

    place: slice
    keys: Tensor
    values: Tensor


class Ring(Way):
    """Memory of a process: its own tokens' and two parts of keys and values, in backward their gradients besides."""

    name, backend = "ring", "ring"
    merit = "keys and values of few heads go round"

    def __init__(self, within: Tiled, layout: Layout, group: dist.ProcessGroup) -> None:
        self.within, self.layout, self.group, self.rank = within, layout, group, group.rank()

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = v.new_zeros(request.b, q.shape[2], request.h, request.e, dtype=request.compute_dtype).transpose(1, 2)
        high = out.new_full(out.shape[:3], float("-inf"))
        low = high.clone()
        for _, parts in self._round(request, k, v):
            for part in parts:
                for queries, block in self._pairs(request, part.place):
                    own = replace(request, block=block)
                    other, lse, *rest = self.within.forward(own, q[:, :, queries], part.keys, part.values)
                    small = rest[0] if rest else torch.zeros_like(lse)
                    theirs = LogSumExp(lse, small.masked_fill(lse == float("-inf"), float("-inf")))
                    mine = LogSumExp(high[:, :, queries], low[:, :, queries])
                    merged, lse_of_both = merge(out[:, :, queries], mine, other, theirs)
                    out[:, :, queries] = merged
                    high[:, :, queries], low[:, :, queries] = lse_of_both
        lse, rest_of_all = LogSumExp(high, low).rounded()
        return (out.to(v.dtype), lse, rest_of_all) if request.keeps_rest else (out.to(v.dtype), lse)

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        dtype = request.compute_dtype
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (given.q, given.k, given.v))
        returning: tuple[Transfer, list[slice]] | None = None

        def add(places: list[slice], gradients: list[Tensor]) -> None:
            for number, place in enumerate(places):
                here = self.layout.here(self.rank, place)
                grad_k[:, :, here] += gradients[2 * number]
                grad_v[:, :, here] += gradients[2 * number + 1]

        for step, parts in self._round(request, given.k, given.v):
            found: list[Tensor] = []
            for part in parts:
                of_keys, of_values = (torch.zeros_like(x, dtype=dtype) for x in (part.keys, part.values))
                for queries, block in self._pairs(request, part.place):
                    of_queries = [x[:, :, queries] for x in (given.q, given.out, given.lse, given.grad_out)]
                    q, out, lse, grad_out = of_queries
                    grad_lse = None if given.grad_lse is None else given.grad_lse[:, :, queries]
                    state = [x[:, :, queries] for x in given.state]
                    inputs = (q, part.keys, part.values, out, lse, state, grad_out, grad_lse, given.bias_gradient)
                    dq, dk, dv = self.within.backward(replace(request, block=block), BackwardInputs(*inputs))
                    grad_q[:, :, queries] += dq
                    of_keys += dk
                    of_values += dv
                found += [of_keys, of_values]
            if returning is not None:
                add(returning[1], returning[0].wait())
                returning = None
            if step == 0:
                add([part.place for part in parts], found)
                continue
            source, to = (self.rank - step) % self.layout.size, (self.rank + step) % self.layout.size
            places = self._needed(request, to, self.rank)
            shapes = self._shapes(places, grad_k, grad_v)
            returning = Transfer(self.group, source, found, to, shapes, like=grad_k), places
        if returning is not None:
            add(returning[1], returning[0].wait())
        return grad_q, grad_k, grad_v

    def _round(self, request: AttentionRequest, k: Tensor, v: Tensor) -> Iterator[tuple[int, list[Part]]]:
        """Step by step the parts that are needed of a process's keys and values, one's own first."""
        size, coming = self.layout.size, None
        for step in range(size):
            places = self._needed(request, self.rank, (self.rank - step) % size)
            tensors = self._taken(places, k, v) if coming is None else coming.wait()
            if step + 1 < size:
                to, source = (self.rank + step + 1) % size, (self.rank - step - 1) % size
                sent = self._taken(self._needed(request, to, self.rank), k, v)
                shapes = self._shapes(self._needed(request, self.rank, source), k, v)
                coming = Transfer(self.group, to, sent, source, shapes, like=k)
            pairs = zip(places, tensors[::2], tensors[1::2], strict=True)
            yield step, [Part(*pair) for pair in pairs]

    def _taken(self, places: list[slice], k: Tensor, v: Tensor) -> list[Tensor]:
        return [x[:, :, self.layout.here(self.rank, place)] for place in places for x in (k, v)]

    @staticmethod
    def _shapes(places: list[slice], k: Tensor, v: Tensor) -> list[torch.Size]:
        return [torch.Size((*x.shape[:2], place.stop - place.start, x.shape[3])) for place in places for x in (k, v)]

    def _needed(self, request: AttentionRequest, rank: int, source: int) -> list[slice]:
        """What process ``rank`` may see, by window and causality, of the chunks of ``source``."""
        found = []
        for chunk in self.layout.chunks(source):
            seen = [self._seen(request, queries, chunk) for queries in self.layout.chunks(rank)]
            seen = [part for part in seen if part.start < part.stop]
            if seen:
                found.append(slice(min(part.start for part in seen), max(part.stop for part in seen)))
        return found

    @staticmethod
    def _seen(request: AttentionRequest, queries: slice, keys: slice) -> slice:
        low, high = request.visibility.keys_of(queries.start, queries.stop)
        if queries.start >= queries.stop:
            return slice(0, 0)
        return slice(max(low, keys.start), min(high, keys.stop))

    def _pairs(self, request: AttentionRequest, keys: slice) -> Iterator[tuple[slice, Block]]:
        """This process's queries that see some of the keys: where they are, and the block of scores."""
        for queries in self.layout.chunks(self.rank):
            seen = self._seen(request, queries, keys)
            if seen.start < seen.stop:
                yield self.layout.here(self.rank, queries), Block(slice(0, request.h), queries, keys)
