"""Attention tiles whose products oneDNN adds in place, for CPUs on which MKL leaves AVX-512 unused.

PyTorch's fused CPU kernel multiplies with MKL inside. A tile here is the same arithmetic by whole-tile operators: the
products reach twice MKL's rate, and powers of two take a quarter of the time of ``exp``, so scores are kept in units of
log 2. In backward a tile stands with keys as rows, ``(j, i)``: then three of its four other products are oneDNN's too,
as they are. One head of one sequence at a time; the threads share each operator.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import products
from ..common.dry_run import num_threads
from ..common.products import PackedWeight, Scratch, product
from ..torch_internals import onednn
from ..torch_internals.tensors import is_fake
from .bias import BiasGradient
from .request import AttentionRequest
from .tiles import Part, Saved, Scores, Upstream, empty_results, parts, tiles
from .visibility import Tile, Visibility
from .way import Way

# The scores of a tile and the width below which calling its operators costs more than they gain, the scores of a head
# below which PyTorch's fused kernel is no slower, and the CPU's threads above which one tile is too little for all.
LEAST_TILE_SCORES, LEAST_WIDTH, LEAST_HEAD_SCORES, MOST_THREADS = 2**18, 32, 2**21, 4
LOG2_E = math.log2(math.e)
# A row keeps its top while a tile's weights relative to it sum to at most this.
MOST_MASS = 2.0**16


class OneDnn(Way):
    """Whole tiles by oneDNN's products."""

    name, backend = "onednn", "tiled"
    merit = "oneDNN's products use this CPU's AVX-512, which MKL, the fused kernel's library, leaves unused"

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if request.device_type != "cpu":
            return f"it is for the CPU, not for {request.device_type}"
        if request.dtype == torch.float64:
            return "it computes in fp32"
        if not request.plain:
            return "other kinds of tensors and torch.func's transforms have rules for PyTorch's public functions alone"
        usable = products.onednn_is_usable(q.device) and onednn.in_place_product() is not None
        return None if usable else "this PyTorch has no oneDNN, or none of its products that add in place"

    def drawback(self, request: AttentionRequest) -> str | None:
        small = request.tile_scores < LEAST_TILE_SCORES or request.n * request.m < LEAST_HEAD_SCORES
        if small or min(request.d, request.e) < LEAST_WIDTH:
            return "calling its operators would cost more than they gain in tiles this small"
        if num_threads() > MOST_THREADS:
            return f"a tile is too little work for more than {MOST_THREADS} threads"
        return None if products.onednn_is_faster() else "MKL is as fast on this CPU"

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = empty_results(request, v)
        shared = _Shared(request.device, transposed=False)
        for part in parts(request, 1):
            head = _Head.of(request, part, shared, q, k, v)
            _attend(head, part.of_query(out)[0, 0], part.of_query(lse)[0, 0])
        return out, lse

    def backward(
        self, request: AttentionRequest, saved: Saved, upstream: Upstream, bias_gradient: BiasGradient
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = torch.zeros_like(saved.q), _zeros_without_gaps(saved.k), _zeros_without_gaps(saved.v)
        shared = _Shared(request.device, transposed=True)
        for part in parts(request, 1):
            head = _Head.of(request, part, shared, saved.q, saved.k, saved.v)
            results = _Results.of(part, saved, upstream)
            gradients = part.of_query(grad_q)[0, 0], part.of_key(grad_k)[0, 0], part.of_key(grad_v)[0, 0]
            _differentiate(head, results, gradients, bias_gradient)
        return grad_q, grad_k, grad_v


def _zeros_without_gaps(x: Tensor) -> Tensor:
    """oneDNN adds to what has no gaps: each head's gradient in one piece, not each token's."""
    return torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


class _Shared:
    """What the heads of one call have in common: buffers, and what tiles must not see.

    Window and causality hide the same in many tiles: it is kept for a few. transposed: tiles are ``(j, i)``.
    """

    FEW = 4

    def __init__(self, device: torch.device, transposed: bool) -> None:
        self.device, self.transposed = device, transposed
        self.scratch = Scratch(torch.float32, device)
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def hidden(self, visibility: Visibility, tile: Tile) -> Tensor | None:
        """Bool, in the tile's shape; None where all is seen."""
        if tile.full:
            return None
        repeated = not visibility.tensors
        place = (tile.i0 - tile.j0, tile.i1 - tile.i0, tile.j1 - tile.j0)
        if repeated and place in self.kept:
            return self.kept[place]
        visible = visibility.tile_mask(tile, self.device)
        assert visible is not None
        hidden = ~visible[0, 0].expand(place[1:])
        if self.transposed:
            hidden = hidden.t().contiguous()
        if repeated:
            if len(self.kept) == self.FEW:
                del self.kept[next(iter(self.kept))]
            self.kept[place] = hidden
        return hidden


class _Head(NamedTuple):
    """One query head of one sequence: ``q (n, d)``, ``k (m, d)``, ``v (m, e)``, and what may be seen."""

    request: AttentionRequest
    part: Part
    shared: _Shared
    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def of(request: AttentionRequest, part: Part, shared: _Shared, q: Tensor, k: Tensor, v: Tensor) -> _Head:
        """``q (b, h, n, d)``, ``k`` and ``v``; part: a single head."""
        return _Head(request, part, shared, part.of_query(q)[0, 0], part.of_key(k)[0, 0], part.of_key(v)[0, 0])

    def start(self, tile: Tile, scores: Tensor, value: Tensor) -> None:
        """Fill the scores that products will be added to with value, bias and what is hidden.

        scores: ``(i, j)``, or as ``shared`` says, transposed. value: of each query, shaped to broadcast.
        """
        scores.copy_(value)
        bias = Scores(self.request, self.part, tile).bias
        if bias is not None:
            scores.add_(bias[0, 0].t() if self.shared.transposed else bias[0, 0], alpha=LOG2_E)
        hidden = self.shared.hidden(self.part.visibility, tile)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)

    def survivors(self, tile: Tile) -> Tensor | None:
        """What dropout keeps ``(i, j)``."""
        survivors = Scores(self.request, self.part, tile).survivors
        return None if survivors is None else survivors[0, 0]


def _attend(head: _Head, out: Tensor, lse: Tensor) -> None:
    """Write the output ``(n, e)`` and the log-sum-exp ``(n,)`` of the rows that see anything."""
    request, scratch = head.request, head.shared.scratch
    keys, values = _Packed(head.k, False), _Packed(head.v, True)
    for row in head.part.rows(request):
        for packed in (keys, values):
            packed.forget_before(row.tiles[0].j0)
        queries = _scaled(head.q[row.queries], request.scale * LOG2_E)
        total, softmax = queries.new_zeros(len(queries), request.e), _Softmax(queries)
        for tile in tiles(row):
            weights = scratch.take("scores", len(queries), tile.j1 - tile.j0)
            softmax.add(head, tile, weights, keys.take(tile, len(queries)), total)
            survivors = head.survivors(tile)
            if survivors is not None:
                weights.mul_(survivors)
            values.take(tile, len(queries)).add_product(total, weights)
        lse[row.queries] = (softmax.top + softmax.mass.log2()).mul_(1 / LOG2_E).squeeze(1)
        mass = softmax.mass.mul_(1 - request.dropout)
        out[row.queries] = total.div_(mass.masked_fill_(mass == 0, 1.0))


class _Softmax:
    """One bucket of queries' weights ``2 ** (score - top)``, a tile at a time, and their sums ``mass``, ``(i, 1)``.

    A row's top is its largest score in the first tile; later tiles keep it while their weights stay small. Their own
    largest scores need not be found then, and products are added to ``-top``: two passes over a tile fewer. Each row's
    numbers are its own, bit for bit, whatever the other rows hold.
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries
        self.mass, self.top = queries.new_zeros(2, len(queries), 1)
        self.unseen = torch.ones_like(self.top, dtype=torch.bool)
        self.first = True

    def add(self, head: _Head, tile: Tile, scores: Tensor, keys: PackedWeight, total: Tensor) -> None:
        """Make this tile's weights of ``scores (i, j)``; what earlier tiles added to ``total (i, e)`` is scaled."""
        higher = torch.ones_like(self.unseen)
        # With a bias scores often rise from tile to tile (ALiBi's do), and all would be computed twice.
        if not self.first and head.request.bias is None and not is_fake(scores):
            self._relative(head, tile, scores, keys)
            mass = scores.exp2_().sum(1, keepdim=True)
            higher = ~(mass <= MOST_MASS) | self.unseen
            if not higher.any():
                self.mass.add_(mass)
                return
        self.first = False
        self._relative(head, tile, scores, keys)
        largest = scores.amax(1, keepdim=True)
        rise = torch.where(self.unseen, largest, largest.clamp_min(0.0))
        self.unseen = self.unseen & (largest == -math.inf)
        rise.masked_fill_(~higher | self.unseen, 0.0)
        self.top = self.top + rise
        shrink = rise.neg().exp2_().masked_fill_(self.mass == 0, 0.0)
        self.mass.mul_(shrink).add_(scores.sub_(rise).exp2_().sum(1, keepdim=True))
        total.mul_(shrink)

    def _relative(self, head: _Head, tile: Tile, scores: Tensor, keys: PackedWeight) -> None:
        head.start(tile, scores, -self.top)
        keys.add_product(scores, self.queries)


class _Results(NamedTuple):
    """What backward is given of a head: ``out (n, e)``, ``lse (n,)`` and their gradients."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    @staticmethod
    def of(part: Part, saved: Saved, upstream: Upstream) -> _Results:
        """part: a single head."""
        out, lse, grad_out = (part.of_query(x)[0, 0] for x in (saved.out, saved.lse, upstream.out))
        return _Results(out, lse, grad_out, None if upstream.lse is None else part.of_query(upstream.lse)[0, 0])


def _differentiate(
    head: _Head, results: _Results, gradients: tuple[Tensor, Tensor, Tensor], bias_gradient: BiasGradient
) -> None:
    """The gradient of q is written ``(n, d)``; those of k ``(m, d)`` and v ``(m, e)``, contiguous, are added to."""
    request, scratch = head.request, head.shared.scratch
    grad_q, grad_k, grad_v = gradients
    survivor_scale = 1 / (1 - request.dropout)
    for row in head.part.rows(request):
        here = row.queries
        queries, upstream = _scaled(head.q[here], request.scale * LOG2_E), _scaled(results.grad_out[here], 1.0)
        i, j = len(queries), row.tiles[0].j1 - row.tiles[0].j0
        minus_delta = (upstream * results.out[here]).sum(1).neg_()
        if results.grad_lse is not None:
            minus_delta.add_(results.grad_lse[here])
        # A row that sees nothing has weights of exp(score - inf) = 0.
        minus_lse = results.lse[here].masked_fill(results.lse[here] == -math.inf, math.inf).mul_(-LOG2_E)
        operands = (queries, upstream, (queries / LOG2_E).t(), upstream.t())
        by_queries, by_upstream, to_keys, to_values = (PackedWeight(x, length=i, rows=j) for x in operands)
        of_queries = queries.new_zeros(request.d, i)
        for tile in tiles(row):
            j = tile.j1 - tile.j0
            k, v = head.k[tile.keys], head.v[tile.keys]
            weights, grads = scratch.take("weights", j, i), scratch.take("gradients", j, i)
            head.start(tile, weights, minus_lse)
            by_queries.add_product(weights, scratch.take("keys", *k.shape).copy_(k))
            weights.exp2_()
            survivors, values = head.survivors(tile), scratch.take("values", *v.shape).copy_(v)
            if survivors is None:
                by_upstream.add_product(grads.copy_(minus_delta), values)
                grads.mul_(weights)
            else:
                survivors = survivors.t().contiguous()
                by_upstream.add_product(grads.zero_(), values)
                grads.mul_(survivors).mul_(survivor_scale).add_(minus_delta).mul_(weights)
                weights.mul_(survivors).mul_(survivor_scale)
            to_values.add_product(grad_v[tile.keys], weights)
            to_keys.add_product(grad_k[tile.keys], grads)
            of_queries += product(scratch.take("keys", request.d, j).copy_(k.t()), grads.t())
            if bias_gradient.wanted:
                bias_gradient.add(tile, head.part.batch, head.part.heads, grads.t()[None, None])
        grad_q[here] = of_queries.t().mul_(request.scale)


class _Packed:
    """Buckets of keys, or of values transposed, ready to be multiplied by, while rows to come may see them."""

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
    """fp32, contiguous."""
    return rows.float().mul(factor).contiguous()
