"""Compute attention tiles by oneDNN's in-place products, for CPUs on which MKL leaves AVX-512 unused and for dropout.

PyTorch's fused CPU kernel multiplies with MKL. Here a tile is the same arithmetic in whole-tile operators: the products
reach twice MKL's rate, and powers of two take a quarter of the time of ``exp``, so scores are in units of log 2. In
backward a tile has keys as rows, ``(j, i)``, so that three of its other four products can use oneDNN without copies.
Each head of a sequence is computed by one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..common import products
from ..common.dry_run import each, num_threads
from ..common.gradients import fresh_total
from ..common.products import PackedWeight, Scratch, product
from ..common.threads import in_threads
from ..torch_internals import onednn
from ..torch_internals.tensors import are_plain, is_fake
from .log_sum_exp import LogSumExp, finite, rounded_away
from .negligible import largest_products
from .request import IMMODERATE, AttentionRequest
from .tiles import (
    Part,
    QueryBucket,
    Scores,
    alike_to,
    cut,
    empty_results,
    nearest_first,
    tiles,
)
from .visibility import Tile
from .way import OF_SCORE, BackwardInputs, Way

# Scores of a tile, and width, below which the operators' overhead exceeds their gain; scores of a head below which
# PyTorch's fused kernel is no slower; threads above which a tile is too little work.
LEAST_TILE_SCORES, LEAST_WIDTH, LEAST_HEAD_SCORES, MOST_THREADS = 2**18, 32, 2**21, 4
LOG2_E = math.log2(math.e)
# A row keeps its top while a tile's weights relative to the top sum to at most this.
MOST_MASS = 2.0**16
MOST_MASKS = 4  # kept at once
# From this width on the products gain more than evaluating documents for each head costs.
WIDE = 128
# Backward holds two tiles per thread: with half as many keys they take no longer, and a megabyte each.
MOST_KEYS_IN_BACKWARD = 512


class OneDnn(Way):
    """Computes whole tiles by oneDNN's products."""

    name, backend = "onednn", "tiled"
    merit = "oneDNN's products, with a head per thread, are the fastest way on this CPU"

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if request.device_type != "cpu":
            return f"it is for the CPU, not for {request.device_type}"
        if request.dtype == torch.float64:
            return "it computes in fp32"
        if request.bias is not None and request.bias.of_score:
            return OF_SCORE
        if not request.moderate:
            return IMMODERATE
        if not are_plain(q, k, v):
            return "tensor subclasses and torch.func's transforms support only PyTorch's public functions"
        usable = products.onednn_is_usable(q.device) and onednn.in_place_product() is not None
        return None if usable else "this PyTorch has no oneDNN, or not its in-place products"

    def drawback(self, request: AttentionRequest) -> str | None:
        small = request.tile_scores < LEAST_TILE_SCORES or request.n * request.m < LEAST_HEAD_SCORES
        if small or min(request.d, request.e) < LEAST_WIDTH:
            return "in tiles this small its operators would cost more than they gain"
        if num_threads() > MOST_THREADS:
            return f"a tile is too little work for more than {MOST_THREADS} threads"
        if not _calls_nobody(request):
            return "a mask or bias function would be called for each head, on one thread"
        if request.visibility.document_ids is not None and min(request.d, request.e) < WIDE:
            return "documents would be evaluated for each head, which costs more than products this narrow gain"
        # The fused kernel has no dropout within a tile, and this is faster than plain products even without AVX-512.
        return None if request.dropout or products.onednn_is_faster() else "MKL is as fast on this CPU"

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, *log_sum_exp = empty_results(request, v)
        kept: dict[tuple[int, ...], Tensor] = {}

        def worker() -> Callable[[Part], None]:
            shared = _Shared(request, False, kept)

            def attend(part: Part) -> None:
                heads = (part.of_query(q), part.of_key(k), part.of_key(v), *map(part.of_query, (out, *log_sum_exp)))
                _attend(shared, part, *(x[0, 0] for x in heads))

            return attend

        alike = alike_to(request, (self.name, q, k, v))
        in_threads(cut(request, 1), worker, apart=_calls_nobody(request), alike=alike)
        return out, *log_sum_exp

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        if not request.dropout and request.visibility.function is None:  # both are evaluated for tiles of this size
            request = replace(request, k_bucket_size=min(request.k_bucket_size, MOST_KEYS_IN_BACKWARD))
        # oneDNN adds only to contiguous memory, so gradients are head-major.
        gradients = torch.zeros_like(given.q), fresh_total(given.k), fresh_total(given.v)
        kept: dict[tuple[int, ...], Tensor] = {}

        def worker() -> Callable[[Sequence[Part]], None]:
            shared = _Shared(request, True, kept)

            def differentiate(group: Sequence[Part]) -> None:
                for part in each(group):
                    _differentiate(shared, part, given, *gradients)

            return differentiate

        # Query heads that add to the same key/value head's gradient run in order on one thread.
        groups: dict[tuple[int, int], list[Part]] = {}
        for part in cut(request, 1):
            groups.setdefault((part.batch.start, part.kv_heads.start), []).append(part)
        apart = _calls_nobody(request) and not given.bias_gradient.wanted
        alike = alike_to(request, (self.name, *given.tensors))
        in_threads(list(groups.values()), worker, apart=apart, alike=alike)
        return gradients


def _calls_nobody(request: AttentionRequest) -> bool:
    """Return True if no function of the caller's, which might not be thread-safe, runs per tile."""
    return request.visibility.function is None and (request.bias is None or request.bias.several_threads)


class _Shared:
    """Holds state shared by the heads of one pass: buffers and masks of hidden scores.

    Window and causality give many tiles the same mask; a few masks are kept in ``kept``, which all threads of a pass
    share. transposed: tiles are ``(j, i)``.
    """

    def __init__(self, request: AttentionRequest, transposed: bool, kept: dict[tuple[int, ...], Tensor]) -> None:
        self.request, self.transposed = request, transposed
        self.scratch, self.kept = Scratch(torch.float32, request.device), kept

    def start(self, of_tile: Scores, scores: Tensor, value: Tensor) -> None:
        """Fill ``scores (i, j)``, or transposed, with each query's broadcast value, and −∞ where hidden.

        Products are added afterwards.
        """
        if of_tile.tile.full:
            scores.copy_(value)
        else:
            scores.copy_(self._hidden(of_tile)).add_(value)

    def start_biased(self, of_tile: Scores, scores: Tensor) -> Tensor:
        """Fill scores with biases less each row's level, and −∞ where hidden; return the level.

        The level ``(i, 1)``, or transposed, is the largest bias that the row sees, as in :meth:`.Scores.relative`.
        """
        bias = of_tile.bias
        assert bias is not None
        values = (bias[0, 0].t() if self.transposed else bias[0, 0]).expand_as(scores)
        if values.dtype != torch.float32:
            values = scores.copy_(values)
        if not of_tile.tile.full:
            values = torch.add(values, self._hidden(of_tile), out=scores)
        level = values.amax(0 if self.transposed else 1, keepdim=True)
        torch.sub(values, finite(level), out=scores)
        return level

    def _hidden(self, of_tile: Scores) -> Tensor:
        """Return −∞ where a partial tile hides, else 0, in the shape of its scores.

        Adding it takes a fifth of the time of ``masked_fill_``; bf16 holds both numbers in two bytes.
        """
        tile = of_tile.tile
        repeated = self.request.visibility.structural
        place = (tile.i0 - tile.j0, tile.i1 - tile.i0, tile.j1 - tile.j0)
        known = self.kept.get(place) if repeated else None
        if known is not None:
            return known
        visible = of_tile.visible
        assert visible is not None
        visible = visible[0, 0].expand(place[1:])
        hidden = (visible.t().contiguous() if self.transposed else visible).to(torch.bfloat16).log_()
        if repeated:
            if len(self.kept) >= MOST_MASKS:
                self.kept.pop(next(iter(list(self.kept))), None)  # on a copy, since other threads add to the original
            self.kept[place] = hidden
        return hidden


def _attend(shared: _Shared, part: Part, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *log_sum_exp: Tensor) -> None:
    """Compute one head of one sequence: write ``out (n, e)`` and the log-sum-exp ``(n,)`` of rows that see anything.

    q: ``(n, d)``. k: ``(m, d)``. v: ``(m, e)``.
    """
    request, scratch = shared.request, shared.scratch
    packed_keys, packed_values = _Packed(k, False), _Packed(v, True)
    bound = largest_products(request, q[None, None], k[None, None])
    for row in part.rows(request):
        for packed in (packed_keys, packed_values):
            packed.forget_before(row.tiles[0].j0)
        queries = _scaled(q[row.queries], request.scale * LOG2_E)
        total, softmax = queries.new_zeros(len(queries), request.e), _Softmax(shared, queries)
        of_row = None if bound is None else bound[:, :, row.queries]
        for tile in nearest_first(request, row):
            of_tile = Scores(request, part, tile, of_row)
            weights = scratch.take("scores", len(queries), tile.j1 - tile.j0)
            if not softmax.add(of_tile, weights, packed_keys.take(tile, len(queries)), total):
                continue
            survivors = of_tile.survivors
            if survivors is not None:
                weights.mul_(survivors[0, 0])
            packed_values.take(tile, len(queries)).add_product(total, weights)
        for whole, part_of_lse in zip(log_sum_exp, softmax.log_sum_exp.rounded(), strict=False):
            whole[row.queries] = part_of_lse.squeeze(1)
        mass = softmax.mass.mul_(1 - request.dropout)
        out[row.queries] = total.div_(mass.masked_fill_(mass == 0, 1.0))


class _Softmax:
    """Computes a bucket of queries' weights ``2 ** (score - top)`` tile by tile, and their sums ``mass``, ``(i, 1)``.

    A row's top is its largest score in the first tile; later tiles keep it while their weights stay small. Then their
    own largest scores need not be found, and products are added to ``-top``, which saves two passes over a tile. Each
    row's result is the same bit for bit whatever the other rows hold. With biases, scores and top are relative to the
    largest bias that the row has seen, its ``level`` in units of 1.
    """

    def __init__(self, shared: _Shared, queries: Tensor) -> None:
        self.shared, self.queries = shared, queries
        self.mass, self.top = queries.new_zeros(2, len(queries), 1)
        self.unseen = torch.ones_like(self.top, dtype=torch.bool)
        self.level = torch.full_like(self.top, -math.inf)
        self.first = True

    def add(self, of_tile: Scores, scores: Tensor, keys: PackedWeight, total: Tensor) -> bool:
        """Turn ``scores (i, j)`` into this tile's weights; scale what earlier tiles added to ``total (i, e)``.

        Return False if all weights are negligible, and nothing was done.
        """
        if of_tile.request.bias is not None:
            return self._add_biased(of_tile, scores, keys, total)
        higher = torch.ones_like(self.unseen)
        if not self.first and not is_fake(scores):
            self._relative(of_tile, scores, keys)
            mass = scores.exp2_().sum(1, keepdim=True)
            higher = ~(mass <= MOST_MASS) | self.unseen
            if not higher.any():
                self.mass.add_(mass)
                return True
        self.first = False
        self._relative(of_tile, scores, keys)
        largest = scores.amax(1, keepdim=True)
        rise = torch.where(self.unseen, largest, largest.clamp_min(0.0))
        self.unseen = self.unseen & (largest == -math.inf)
        rise.masked_fill_(~higher | self.unseen, 0.0)
        self.top = self.top + rise
        shrink = rise.neg().exp2_().masked_fill_(self.mass == 0, 0.0)
        self.mass.mul_(shrink).add_(scores.sub_(rise).exp2_().sum(1, keepdim=True))
        total.mul_(shrink)
        return True

    @property
    def log_sum_exp(self) -> LogSumExp:
        return LogSumExp.of((self.top + self.mass.log2()).mul_(1 / LOG2_E), self.level)

    def _add_biased(self, of_tile: Scores, scores: Tensor, keys: PackedWeight, total: Tensor) -> bool:
        # With biases scores often rise from tile to tile: a kept top would have all computed twice.
        level = self.shared.start_biased(of_tile, scores)
        negligible = of_tile.negligible(level - self.level - self.top / LOG2_E)
        if negligible is not None:
            if negligible.all():
                return False
            level = level.masked_fill(negligible.view(-1, 1), -math.inf)
        _add_product(keys, scores.mul_(LOG2_E), self.queries, rounded_away(level))
        higher = torch.maximum(self.level, level)
        before = self.top + (self.level - finite(higher)).mul_(LOG2_E)
        rise = (level - finite(higher)).mul_(LOG2_E)
        top = finite(torch.maximum(before, scores.amax(1, keepdim=True) + rise))
        shrink = (before - top).exp2_()
        weights = scores.add_(rise - top).exp2_()
        self.mass.mul_(shrink).add_(weights.sum(1, keepdim=True))
        total.mul_(shrink)
        self.level, self.top = higher, top
        return True

    def _relative(self, of_tile: Scores, scores: Tensor, keys: PackedWeight) -> None:
        self.shared.start(of_tile, scores, -self.top)
        keys.add_product(scores, self.queries)


def _differentiate(shared: _Shared, part: Part, given: BackwardInputs, *gradients: Tensor) -> None:
    """Differentiate one head of one sequence: write the gradient of q and add to those of k and v."""
    request, scratch = shared.request, shared.scratch
    grad_q = part.of_query(gradients[0])[0, 0]
    k, v, grad_k, grad_v = (part.of_key(x)[0, 0] for x in (given.k, given.v, *gradients[1:]))
    survivor_scale = 1 / (1 - request.dropout)
    bound = largest_products(request, part.of_query(given.q), part.of_key(given.k))
    for row in part.rows(request):
        bucket = QueryBucket.of(part, row.queries, given, torch.float32)
        q, grad_out, delta = (x[0, 0] for x in (bucket.q, bucket.grad_out, bucket.delta))
        queries, upstream = _scaled(q, request.scale * LOG2_E), _scaled(grad_out, 1.0)
        # Of two tiles, since the first may be cut.
        i, j = len(queries), max(t.j1 - t.j0 for t in (row.tiles[0], row.tiles[len(row.tiles) // 2]))
        minus_delta, minus_lse = delta.neg_(), bucket.lse[0, 0] * -LOG2_E
        operands = (queries, upstream, (queries / LOG2_E).t(), upstream.t())
        by_queries, by_upstream, to_keys, to_values = (PackedWeight(x, length=i, rows=j) for x in operands)
        of_row = None if bound is None else bound[:, :, row.queries]
        of_queries = queries.new_zeros(request.d, i)
        for tile in tiles(row):
            j = tile.j1 - tile.j0
            of_tile, keys, values = Scores(request, part, tile, of_row), k[tile.keys], v[tile.keys]
            weights, grads = scratch.take("weights", j, i), scratch.take("gradients", j, i)
            equal = None
            if request.bias is None:
                shared.start(of_tile, weights, minus_lse)
            else:
                level = shared.start_biased(of_tile, weights).view(-1, 1)
                equal = rounded_away(level)
                above = bucket.lse_above(level).unsqueeze(-1)
                negligible = of_tile.negligible(-above)
                if negligible is not None:
                    if negligible.all():
                        continue
                    above = above.masked_fill(negligible.unsqueeze(-1), math.inf)
                weights.sub_(above[0, 0].t()).mul_(LOG2_E)
            dense = scratch.take("keys", *keys.shape).copy_(keys)
            _add_product(by_queries, weights, dense, None if equal is None else equal.t())
            weights.exp2_()
            survivors, values = of_tile.survivors, scratch.take("values", *values.shape).copy_(values)
            if survivors is None:
                by_upstream.add_product(grads.copy_(minus_delta), values)
                grads.mul_(weights)
            else:
                kept = survivors[0, 0].t().contiguous()
                by_upstream.add_product(grads.zero_(), values)
                grads.mul_(kept).mul_(survivor_scale).add_(minus_delta).mul_(weights)
                weights.mul_(kept).mul_(survivor_scale)
            to_values.add_product(grad_v[tile.keys], weights)
            to_keys.add_product(grad_k[tile.keys], grads)
            of_queries += product(scratch.take("keys", request.d, j).copy_(keys.t()), grads.t())
            if given.bias_gradient.wanted:
                given.bias_gradient.add(tile, part.batch, part.heads, grads.t()[None, None])
        grad_q[row.queries] = of_queries.t().mul_(request.scale)


def _add_product(packed: PackedWeight, scores: Tensor, values: Tensor, equal: Tensor | None) -> None:
    """Add products to the scores, except to those that count as equal beside their biases."""
    biases = None if equal is None else scores.clone()
    packed.add_product(scores, values)
    if equal is not None and biases is not None:
        torch.where(equal, biases, scores, out=scores)


class _Packed:
    """Packs buckets of keys, or of transposed values, for oneDNN and keeps them while later rows may see them."""

    def __init__(self, tensor: Tensor, transposed: bool) -> None:
        self.tensor, self.transposed = tensor, transposed
        self.kept: dict[int, tuple[int, PackedWeight]] = {}

    def take(self, tile: Tile, rows: int) -> PackedWeight:
        end, weight = self.kept.get(tile.j0, (0, None))
        if weight is None or end != tile.j1:
            part = self.tensor[tile.keys]
            weight = PackedWeight(part.t() if self.transposed else part, length=len(part), rows=rows)
            self.kept[tile.j0] = tile.j1, weight
        return weight

    def forget_before(self, key: int) -> None:
        self.kept = {start: found for start, found in self.kept.items() if start >= key}


def _scaled(rows: Tensor, factor: float) -> Tensor:
    """Return ``rows · factor``, in fp32, contiguous."""
    return rows.float().mul(factor).contiguous()
