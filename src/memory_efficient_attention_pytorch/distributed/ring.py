"""Pass keys and values around a ring: each process's queries attend to a part of the keys at a time.

The parts' results are merged by log-sum-exp, as tiles are (Liu et al., "Ring attention", 2023, arXiv:2310.01889). In
step s a process sends to the one s places on, so that keys hidden by a window are never sent. Keys are sent a slice at
a time, the next one while the current one's tiles are computed, so that a process holds few of them whatever the
length. In backward a slice's gradients return to its owner in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import permutations
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.log_sum_exp import LogSumExp
from ..attention.request import AttentionRequest
from ..attention.tiles import Found, Tiled, cut
from ..attention.visibility import Block
from ..attention.way import BackwardInputs, Way
from ..common.dry_run import each
from .exchange import Layout, Transfer, meet

SLICE = {"cpu": 2**19}
"""Bytes of keys and values sent at a time."""
SLICE_ELSEWHERE = 2**25


class Part(NamedTuple):
    """A slice of keys and values, and its place in the whole sequence."""

    place: slice
    keys: Tensor
    values: Tensor


class Turn(NamedTuple):
    """One exchange: the slice received from the process ``step`` places before, and the own slice sent, or None."""

    step: int
    got: slice | None
    given: slice | None


class Ring(Way):
    """Computes tiles slice by slice as keys and values go round.

    A process holds its own tokens and a few slices of keys and values, in backward also of their gradients.
    """

    name, backend = "ring", "ring"
    merit = "keys and values are passed around a ring"

    def __init__(self, within: Tiled, layout: Layout, group: dist.ProcessGroup) -> None:
        self.within, self.layout, self.group, self.rank = within, layout, group, group.rank()

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        meet(self.group, q.device)
        # Token-major in memory, so that merging the heads afterwards is a view.
        shape, dtype = (request.b, q.shape[2], request.h, request.e), request.compute_dtype
        out = v.new_zeros(shape, dtype=dtype).transpose(1, 2)
        high = out.new_full(out.shape[:3], float("-inf"))
        everything = Found(out, LogSumExp(high, high.clone()))
        for _, part in self._round(request, k, v):
            for queries, block in self._pairs(request, part.place):
                own, so_far = replace(request, block=block), everything.of(queries)
                for of, here, found, of_found in self.within.rows(
                    own, q[:, :, queries], part.keys, part.values, so_far
                ):
                    for whole, of_row in zip((so_far.out, *so_far.lse), (found, *of_found), strict=True):
                        of.of_query(whole)[:, :, here] = of_row
                    del found, of_found, of_row  # before the next row is computed
        lse, rest = everything.lse.rounded()
        return (out.to(v.dtype), lse, rest) if request.keeps_rest else (out.to(v.dtype), lse)

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        dtype = request.compute_dtype
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (given.q, given.k, given.v))
        returning: Transfer | None = None
        coming: slice | None = None

        def take() -> None:
            if returning is not None:
                for total, gradient in zip(self._own(coming, grad_k, grad_v), returning.wait(), strict=True):
                    total += gradient

        for turn, part in self._round(request, given.k, given.v):
            found = self._own(part.place, grad_k, grad_v)
            if turn.step:
                found = [torch.zeros_like(x, dtype=dtype) for x in (part.keys, part.values)]
            for queries, block in self._pairs(request, part.place):
                self._add(replace(request, block=block), given, queries, part, grad_q, *found)
            if turn.step == 0:
                continue
            take()
            source, to = (self.rank - turn.step) % self.layout.size, (self.rank + turn.step) % self.layout.size
            sent, coming = found if turn.got else [], turn.given
            returning = Transfer(self.group, source, sent, to, self._shapes(coming, grad_k, grad_v), like=grad_k)
        take()
        return grad_q, grad_k, grad_v

    def _add(
        self, own: AttentionRequest, given: BackwardInputs, queries: slice, part: Part, grad_q: Tensor, *found: Tensor
    ) -> None:
        """Add a block's gradients to those of all queries and, in ``found``, of the part's keys and values."""
        q, out, lse, grad_out = (x[:, :, queries] for x in (given.q, given.out, given.lse, given.grad_out))
        grad_lse = None if given.grad_lse is None else given.grad_lse[:, :, queries]
        state = [x[:, :, queries] for x in given.state]
        inputs = (q, part.keys, part.values, out, lse, state, grad_out, grad_lse, given.bias_gradient)
        self.within.add_gradients(own, BackwardInputs(*inputs), grad_q[:, :, queries], *found)

    def _round(self, request: AttentionRequest, k: Tensor, v: Tensor) -> Iterator[tuple[Turn, Part]]:
        """Yield the keys and values that this process needs slice by slice, its own first; empty if none was sent."""
        turns = self._turns(request, k, v)
        coming: Transfer | None = None
        expected = turns[0]
        pairs = [*zip(turns, [*turns[1:], None], strict=True)]
        # A dry run sees the own turns and, of the others, some with all that is held at once: what came, what is under
        # way and what returns.
        first = sum(turn.step == 0 for turn in turns) + 3
        for turn, following in each(pairs, size=partial(self._work, request), first=first):
            if turn is not expected:  # a dry run has left some out
                coming = self._exchange(turn, k, v)
            tensors = self._own(turn.got, k, v) if coming is None else coming.wait()
            coming = None
            if following is not None:
                expected, coming = following, self._exchange(following, k, v)
            yield turn, Part(turn.got or slice(0, 0), *(tensors or (k[:, :, :0], v[:, :, :0])))

    def _exchange(self, turn: Turn, k: Tensor, v: Tensor) -> Transfer | None:
        """Begin a turn's transfers; None where the keys are this process's own."""
        if turn.step == 0:
            return None
        to, source = ((self.rank + step) % self.layout.size for step in (turn.step, -turn.step))
        return Transfer(self.group, to, self._own(turn.given, k, v), source, self._shapes(turn.got, k, v), like=k)

    def _work(self, request: AttentionRequest, pair: tuple[Turn, Turn | None]) -> int:
        """Return the work of a turn: the scores of its tiles that are not empty."""
        total = 1
        for _, block in self._pairs(request, pair[0].got or slice(0, 0)):
            own = replace(request, block=block)
            part, *_ = cut(own, 1)  # structure hides the same in all heads
            total += sum(row.scores for row in part.rows(own))
        return total

    def _turns(self, request: AttentionRequest, k: Tensor, v: Tensor) -> list[Turn]:
        per_token = sum(x.shape[0] * x.shape[1] * x.shape[3] for x in (k, v)) * k.element_size()
        buckets = SLICE.get(request.device_type, SLICE_ELSEWHERE) // max(1, per_token * request.k_bucket_size)
        visible = request.visibility
        sides = (visible.left, visible.right)
        return turns(self.layout, self.rank, sides, request.k_bucket_size, max(1, buckets))

    def _own(self, place: slice | None, *tensors: Tensor) -> list[Tensor]:
        """Return views of a slice of this process's tensors."""
        return [] if place is None else [x[:, :, self.layout.here(self.rank, place)] for x in tensors]

    @staticmethod
    def _shapes(place: slice | None, k: Tensor, v: Tensor) -> list[torch.Size]:
        if place is None:
            return []
        return [torch.Size((*x.shape[:2], place.stop - place.start, x.shape[3])) for x in (k, v)]

    def _pairs(self, request: AttentionRequest, keys: slice) -> Iterator[tuple[slice, Block]]:
        """Yield the chunks of this process's queries that see some of the keys, with the block of scores."""
        sides = (request.visibility.left, request.visibility.right)
        for queries in self.layout.chunks(self.rank):
            seen = _seen(sides, queries, keys)
            if seen.start < seen.stop:
                yield self.layout.here(self.rank, queries), Block(slice(0, request.h), queries, keys)


Sides = tuple[int | None, int | None]


@lru_cache(maxsize=256)
def turns(layout: Layout, rank: int, sides: Sides, bucket: int, most: int) -> list[Turn]:
    """Return a process's exchanges in order, in slices of at most ``most`` buckets.

    A step has as many turns for every process, so that messages between two of them arrive in the expected order.
    """
    own = [Turn(0, part, None) for part in needed(layout, rank, rank, sides)]
    found = own or [Turn(0, None, None)]
    for step in range(1, layout.size):
        of_all = [needed(layout, to, (to - step) % layout.size, sides) for to in range(layout.size)]
        count = max(1, *(len(_slices(parts, most * bucket)) for parts in of_all))
        got, given = (_spread(of_all[to], count, bucket) for to in (rank, (rank + step) % layout.size))
        found += [Turn(step, *slices) for slices in zip(got, given, strict=True)]
    return found


def _spread(parts: Sequence[slice], count: int, bucket: int) -> list[slice | None]:
    """Slices of whole buckets, evenly over so many turns. Under causality fewer keys are each seen by more queries:
    processes, which wait for one another in each turn, then have as much to do in each."""
    tokens = sum(part.stop - part.start for part in parts)
    length = -(-tokens // (count * bucket)) * bucket
    while len(slices := _slices(parts, length)) > count:
        length += bucket
    found: list[slice | None] = [None] * count
    for number, part in enumerate(slices):
        found[number * count // len(slices)] = part
    return found


def _slices(parts: Sequence[slice], longest: int) -> list[slice]:
    starts = [(start, part.stop) for part in parts for start in range(part.start, part.stop, longest)]
    return [slice(start, min(start + longest, stop)) for start, stop in starts]


def needed(layout: Layout, rank: int, source: int, sides: Sides) -> list[slice]:
    """Return the parts of ``source``'s chunks that process ``rank`` may see by window and causality."""
    found: list[slice] = []
    for chunk in layout.chunks(source):
        # Of its two chunks of queries the earlier sees the earlier keys; between the two there may be some for neither.
        seen = [_seen(sides, queries, chunk) for queries in layout.chunks(rank)]
        first, *others = [part for part in seen if part.start < part.stop] or [slice(0, 0)]
        if others and others[0].start <= first.stop:
            first, others = slice(first.start, max(first.stop, others[0].stop)), []
        found += [part for part in (first, *others) if part.start < part.stop]
    return found


@lru_cache(maxsize=256)
def tokens_sent(layout: Layout, sides: Sides) -> int:
    """Return the number of tokens whose keys and values all processes together send in forward."""
    pairs = permutations(range(layout.size), 2)
    return sum(part.stop - part.start for rank, source in pairs for part in needed(layout, rank, source, sides))


def _seen(sides: Sides, queries: slice, keys: slice) -> slice:
    """Return the keys that some query may see, as a slice; none if it stops at or before its start."""
    left, right = sides
    low = keys.start if left is None else max(keys.start, queries.start - left)
    high = keys.stop if right is None else min(keys.stop, queries.stop + right)
    return slice(low, high)
