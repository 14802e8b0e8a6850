"""Compute attention one tile of scores at a time, in memory linear in n and m for every request.

The online softmax of Milakov & Gimelshein (2018), the order of Rabe & Staats, "Self-attention does not need O(n²)
memory" (2021), and the backward pass of Dao et al., "FlashAttention" (2022): the output and each row's log-sum-exp are
kept for backward, and every tile is recomputed from q and k.

This module holds what all ways of computing a tile share: cutting batch and heads into parts, a tile's masks and
biases, and the loops.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dry_run import Alike, each
from .bias import BiasGradient
from .broadcasting import EVERYTHING
from .log_sum_exp import LogSumExp, finite, less_level, merge, two_sum
from .negligible import NEGLIGIBLE
from .request import AttentionRequest
from .visibility import Row, Tile, Visibility
from .way import BackwardInputs, Way

# Scores alive at once in one tile of plain matrix products: 4 MiB of fp32 fit in a CPU's cache, a GPU needs more work.
ELEMENTS_ON_A_CPU, ELEMENTS_ELSEWHERE = 2**20, 2**25


class Part(NamedTuple):
    """A part of the batch and of the query heads, the key/value heads that they use, and what they may see.

    held: the index of the first query head in the given tensors; ``heads`` index the whole, ``kv_heads`` the given
    tensors.
    """

    batch: slice
    heads: slice
    kv_heads: slice
    visibility: Visibility
    schedules: dict[tuple[int, int], list[Row]]  # shared with the parts that may see the same
    held: int = 0

    def of_query(self, x: Tensor) -> Tensor:
        """Return the part's heads of ``x (b, h, …)``."""
        return x[self.batch, shifted(self.heads, self.held)]

    def of_key(self, x: Tensor) -> Tensor:
        """Return the key/value heads that they use, of ``x (b, kv, …)``."""
        return x[self.batch, self.kv_heads]

    def rows(self, request: AttentionRequest) -> Iterable[Row]:
        """Iterate over the rows of tiles, in a dry run over a few of them."""
        buckets = (request.q_bucket_size, request.k_bucket_size)
        if buckets not in self.schedules:
            self.schedules[buckets] = self.visibility.schedule(*buckets, request.device, request.block)
        rows = self.schedules[buckets]
        # Under causality rows grow and end alternately in wide and narrow tiles; the very last may have few queries.
        return each(rows, size=lambda row: row.scores, last=3)


def shifted(part: slice, first: int) -> slice:
    """Shift indices of the whole to those of the given tensors, which begin at ``first``."""
    return slice(part.start - first, part.stop - first)


def tiles(row: Row) -> Iterable[Tile]:
    """Iterate over the tiles of a row, in a dry run over a few of them."""
    return each(row.tiles, size=lambda tile: tile.scores, last=2)


def nearest_first(request: AttentionRequest, row: Row) -> Iterable[Tile]:
    """Iterate over the tiles of a row, with a bias in order of their distance.

    Where biases fall with distance, what the far tiles would add is then negligible beside what has been found.
    """
    if request.bias is None or len(row.tiles) < 2:
        return tiles(row)
    position = row.queries.start + row.queries.stop + 2 * request.visibility.offset
    ordered = sorted(row.tiles, key=lambda tile: abs(tile.j0 + tile.j1 - position))
    return tiles(row._replace(tiles=ordered))


def parts(request: AttentionRequest, elements: int | None = None, *, alike: Alike = None) -> Iterable[Part]:
    """Cut batch and heads so that a tile of a part holds at most ``elements`` scores, or else those of one head.

    A part's heads are whole groups that share a key/value head, or a piece of one group. None: as many elements as fit
    in the device's cache. alike: the pass and its tensors, by which a dry run recognises an equal loop.
    """
    return each(cut(request, elements), alike=alike_to(request, alike))


def alike_to(request: AttentionRequest, alike: Alike) -> Alike:
    """Return a key that is equal for loops over parts that take the same memory; None if there is none."""
    plain = request.visibility.structural and request.bias is None
    return (*alike, request) if alike and plain else None


def cut(request: AttentionRequest, elements: int | None = None) -> list[Part]:
    """Return all of :func:`parts`."""
    if elements is None:
        elements = ELEMENTS_ON_A_CPU if request.device_type == "cpu" else ELEMENTS_ELSEWHERE
    per_part = max(1, elements // max(1, request.tile_scores))
    group, held = max(1, request.h // request.kv), request.held.heads
    h, first = held.stop - held.start, held.start // group
    fitting = [s for s in range(1, min(h, per_part) + 1) if h % s == 0 and 0 in (s % group, group % s)]
    heads = max([1, *fitting])
    batch = max(1, per_part // h) if heads == h else 1
    found = []
    for b0 in range(0, request.b, batch):
        schedules: dict[tuple[int, int], list[Row]] = {}
        for h0 in range(held.start, held.stop, heads):
            of_batch, of_heads = slice(b0, min(b0 + batch, request.b)), slice(h0, h0 + heads)
            kv = slice(h0 // group - first, max(h0 // group + 1, (h0 + heads) // group) - first)
            known = schedules if request.visibility.alike_in_heads else {}
            found.append(Part(of_batch, of_heads, kv, request.visibility.narrow(of_batch, of_heads), known, held.start))
    return found


class Scores(NamedTuple):
    """One tile of a part: its biases, its visible keys, its dropout mask.

    bound: by :func:`.negligible.largest_products`, of the tile's queries. seen: the log-sum-exp of the tiles before.
    """

    request: AttentionRequest
    part: Part
    tile: Tile
    bound: Tensor | None = None
    seen: LogSumExp | None = None

    @staticmethod
    def all_of(request: AttentionRequest) -> Scores:
        """Return the whole request as a single tile."""
        part = Part(EVERYTHING, EVERYTHING, EVERYTHING, request.visibility, {})
        return Scores(request, part, Tile(0, request.n, 0, request.m, request.visibility.trivial))

    @property
    def visible(self) -> Tensor | None:
        """Bool, broadcastable to ``(b, h, i, j)``, True = visible; None when nothing is hidden."""
        return self.part.visibility.tile_mask(self.tile, self.request.device)

    @property
    def bias(self) -> Tensor | None:
        """The bias, broadcastable to ``(b, h, i, j)``; None where nothing is added."""
        bias = self.request.bias
        if bias is None or bias.of_score:
            return None
        return bias.tile(self.tile, self.part.batch, self.part.heads, self.request.device)

    @property
    def is_modified(self) -> bool:
        """Whether a function replaces the scores."""
        return self.request.bias is not None and self.request.bias.of_score

    def modified(self, values: Tensor, gradient: BiasGradient | None = None) -> Tensor:
        """Apply the function to ``values (b, h, i, j)``; with ``gradient`` record a graph."""
        by = self.request.bias if gradient is None else gradient
        assert by is not None
        return by.modified(self.tile, self.part.batch, self.part.heads, values)

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """Return bias and mask as one tensor to add to the scores; None without either."""
        return additive(self.visible, self.bias, dtype)

    def relative(self, dtype: torch.dtype, visible: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return :meth:`added` less each row's level, and the level ``(b|1, h|1, i|1, 1)``.

        The level is the largest bias that a row sees in this tile, −∞ where it sees none, and None without a bias.
        Softmax does not depend on it, but beside a level of −1e9 fp32 would round the scores away.
        """
        bias = self.bias
        added = additive(visible, bias, dtype)
        return (added, None) if bias is None or added is None else less_level(added)

    def negligible(self, relative: Tensor) -> Tensor | None:
        """Return which rows have only negligible weights, ``(b, h, i)``; None if none has.

        relative: each row's level of biases less what is known of its log-sum-exp.
        """
        rows = None if self.bound is None else relative.reshape(self.bound.shape) + self.bound < NEGLIGIBLE
        return rows if rows is not None and rows.any() else None

    @property
    def survivors(self) -> Tensor | None:
        """Bool ``(b, h, i, j)``: which probabilities dropout keeps; None without dropout.

        It depends only on seed, place and tile, so it is the same in any order and again in backward. On a CPU each
        head has its own draw, since there the parts depend on the number of threads.
        """
        request, part, tile = self.request, self.part, self.tile
        if not request.dropout:
            return None
        size = (part.batch.stop - part.batch.start, part.heads.stop - part.heads.start)
        tile = part.visibility.whole_tile(tile, request.q_bucket_size, request.k_bucket_size)
        shape = (*size, tile.i1 - tile.i0, tile.j1 - tile.j0)
        keep = torch.empty(shape, dtype=torch.bool, device=request.device)
        generator = torch.Generator(request.device)
        draws = {(0, 0): keep}
        if request.device_type == "cpu":
            draws = {(b, h): keep[b, h] for b in range(size[0]) for h in range(size[1])}
        for (b, h), draw in draws.items():
            generator.manual_seed(_mix(request.seed, part.batch.start + b, part.heads.start + h, tile.i0, tile.j0))
            draw.bernoulli_(1 - request.dropout, generator=generator)
        return keep[:, :, shifted(self.tile.queries, tile.i0), shifted(self.tile.keys, tile.j0)]


def additive(visible: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``bias``, or 0, where ``visible``, −∞ elsewhere; None without either."""
    if visible is None:
        return None if bias is None else bias.to(dtype)
    value = torch.zeros((), dtype=dtype, device=visible.device) if bias is None else bias.to(dtype)
    return torch.where(visible, value, float("-inf"))


def _mix(*values: int) -> int:
    """Return a 63-bit hash of integers (the finaliser of SplitMix64, Steele et al. 2014, chained)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1


class QueryBucket(NamedTuple):
    """The queries of one row in backward.

    delta: row sum of output times its gradient, less the gradient of the log-sum-exp. lse: +∞ where nothing is seen, so
    that ``exp(score − lse)`` is 0, not NaN. rest: the rounding error of the log-sum-exp, None where it is not kept.
    bias_gradient: shared by all buckets.
    """

    q: Tensor
    out: Tensor
    grad_out: Tensor
    lse: Tensor
    rest: Tensor | None
    delta: Tensor
    bias_gradient: BiasGradient

    @staticmethod
    def of(part: Part, queries: slice, given: BackwardInputs, dtype: torch.dtype) -> QueryBucket:
        """Return a part's bucket of these queries; delta is summed in ``dtype``."""
        of_queries = (given.q, given.out, given.grad_out, given.lse)
        q, out, grad_out, lse = (part.of_query(x)[:, :, queries] for x in of_queries)
        delta = (grad_out.to(dtype) * out).sum(dim=-1)
        if given.grad_lse is not None:
            delta = delta - part.of_query(given.grad_lse)[:, :, queries]
        rest = part.of_query(given.state[0])[:, :, queries] if given.state else None
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        return QueryBucket(q, out, grad_out, lse, rest, delta, given.bias_gradient)

    def above(self, level: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the log-sum-exp less the level of a tile's biases, if any, and its rest, ``(b, h, i, 1)``."""
        lse, rest = (None if x is None else x.unsqueeze(-1) for x in (self.lse, self.rest))
        assert lse is not None
        if level is None:
            return lse, rest
        above, lost = two_sum(lse, -finite(level))
        return above, None if rest is None else rest + lost.masked_fill(lse == float("inf"), 0.0)

    def lse_above(self, level: Tensor | None) -> Tensor:
        """Return the log-sum-exp with its rest, ``(b, h, i)``, less the level of a tile's biases, if any."""
        lse, rest = self.above(level)
        return (lse if rest is None else lse + rest).squeeze(-1)


class Found(NamedTuple):
    """Queries' output ``(b, h, i, e)`` and log-sum-exp so far, in the compute dtype."""

    out: Tensor
    lse: LogSumExp

    def at(self, part: Part, queries: slice) -> tuple[Tensor, LogSumExp]:
        """Return those of a part's heads and some of its queries."""
        out, *lse = (part.of_query(x)[:, :, queries] for x in (self.out, *self.lse))
        return out, LogSumExp(*lse)

    def of(self, queries: slice) -> Found:
        """Return views for some of the queries."""
        out, *lse = (x[:, :, queries] for x in (self.out, *self.lse))
        return Found(out, LogSumExp(*lse))


TileGradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Tiled(Way):
    """A way that computes each tile by itself."""

    backend = "tiled"

    def elements(self, request: AttentionRequest) -> int | None:
        """How many scores may exist at once; None: as many as stay in the device's cache."""
        return None

    def bound(self, request: AttentionRequest, q: Tensor, k: Tensor) -> Tensor | None:
        """Return :func:`.negligible.largest_products` if tiles of negligible weights are left out."""
        return None

    @abstractmethod
    def attend(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, LogSumExp] | None:
        """Return this tile's normalised output ``(b, h, i, e)`` and log-sum-exp, in the compute dtype.

        None may be returned if all weights are negligible beside those seen.
        """

    @abstractmethod
    def differentiate(self, scores: Scores, bucket: QueryBucket, k: Tensor, v: Tensor) -> TileGradients | None:
        """Return this tile's part of the gradients of q, k and v, and the gradient of its scores or None.

        None may be returned if all weights are negligible.
        """

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        # A block's output will be merged with others, so it is in the compute dtype.
        out, *log_sum_exp = empty_results(request, v, None if request.block is None else request.compute_dtype)
        for part, here, found, lse in self.rows(request, q, k, v):
            part.of_query(out)[:, :, here] = found
            for whole, of_row in zip(log_sum_exp, lse.rounded(), strict=False):
                part.of_query(whole)[:, :, here] = of_row
            del found, lse, of_row  # before the next row is computed
        return out, *log_sum_exp

    def rows(
        self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, before: Found | None = None
    ) -> Iterator[tuple[Part, slice, Tensor, LogSumExp]]:
        """Yield, row by row of each part, its queries' slice, their output and log-sum-exp.

        before: results for other keys, to merge with.
        """
        first_query, first_key = request.held.queries.start, request.held.keys.start
        for part in parts(request, self.elements(request), alike=(self.name, q, k, v)):
            keys, values = part.of_key(k), part.of_key(v)
            bound = self.bound(request, part.of_query(q), keys)
            for row in part.rows(request):
                here = shifted(row.queries, first_query)
                queries = part.of_query(q)[:, :, here]
                of_row = None if bound is None else bound[:, :, here]
                merged = None if before is None else before.at(part, here)
                for tile in nearest_first(request, row):
                    there, seen = shifted(tile.keys, first_key), None if merged is None else merged[1]
                    scores = Scores(request, part, tile, of_row, seen)
                    found = self.attend(scores, queries, keys[:, :, there], values[:, :, there])
                    merged = merged if found is None else found if merged is None else merge(*merged, *found)
                assert merged is not None  # a row has a tile
                yield part, here, *merged

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        dtype = request.compute_dtype
        grad_q = torch.zeros_like(given.q, dtype=None if request.block is None else dtype)
        grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (given.k, given.v))
        self.add_gradients(request, given, grad_q, grad_k, grad_v)
        return grad_q, grad_k, grad_v

    def add_gradients(
        self, request: AttentionRequest, given: BackwardInputs, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None:
        """Add the gradients of the given queries, keys and values to these tensors (compute dtype, or q's own)."""
        # A bucket's query gradients are complete at once; keys' and values' are summed over all buckets of queries.
        dtype, bias_gradient = request.compute_dtype, given.bias_gradient
        first_query, first_key = request.held.queries.start, request.held.keys.start
        for part in parts(request, self.elements(request), alike=(self.name, *given.tensors)):
            keys, values, to_keys, to_values = (part.of_key(x) for x in (given.k, given.v, grad_k, grad_v))
            bound = self.bound(request, part.of_query(given.q), keys)
            for row in part.rows(request):
                queries = shifted(row.queries, first_query)
                of_row = None if bound is None else bound[:, :, queries]
                bucket = QueryBucket.of(part, queries, given, dtype)
                of_queries = torch.zeros_like(bucket.q, dtype=dtype)
                for tile in tiles(row):
                    here = (EVERYTHING, EVERYTHING, shifted(tile.keys, first_key))
                    scores = Scores(request, part, tile, of_row)
                    found = self.differentiate(scores, bucket, keys[here], values[here])
                    if found is None:
                        continue
                    dq, dk, dv, ds = found
                    of_queries += dq
                    to_keys[here] += dk
                    to_values[here] += dv
                    if ds is not None and bias_gradient.wanted:
                        bias_gradient.add(tile, part.batch, part.heads, ds)
                part.of_query(grad_q)[:, :, queries] += of_queries


def empty_results(request: AttentionRequest, v: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Return results of rows that see nothing: output, log-sum-exp and, where kept, its rounding error."""
    # Token-major in memory, so that merging the heads afterwards is a view.
    h, n = (part.stop - part.start for part in request.held[:2])
    out = v.new_zeros(request.b, n, h, request.e, dtype=dtype).transpose(1, 2)
    lse = v.new_full((request.b, h, n), float("-inf"), dtype=request.compute_dtype)
    return (out, lse, torch.zeros_like(lse)) if request.keeps_rest else (out, lse)
