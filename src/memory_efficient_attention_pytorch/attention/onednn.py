"""Attention tiles whose products oneDNN adds in place, for CPUs on which MKL leaves AVX-512 unused.

PyTorch's fused CPU kernel multiplies with MKL inside. A tile here is the same arithmetic by whole-tile operators: the
products reach twice MKL's rate, and powers of two take a quarter of the time of ``exp``, so scores are kept in units of
log 2. In backward a tile stands with keys as rows, ``(j, i)``: then three of its four other products are oneDNN's too,
as they are. One head of one sequence at a time; the threads share each operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..common.products import Factor, Scratch, product
from .request import AttentionRequest, Part
from .visibility import Tile, Visibility, each_row, each_tile

LOG2_E = math.log2(math.e)
# A row keeps its top while a tile's weights relative to it sum to at most this.
MOST_MASS = 2.0**16


class Shared:
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


class Head(NamedTuple):
    """One query head of one sequence: ``q (n, d)``, ``k (m, d)``, ``v (m, e)``, and what may be seen."""

    request: AttentionRequest
    part: Part
    visibility: Visibility
    shared: Shared
    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def of(
        request: AttentionRequest,
        part: Part,
        visibility: Visibility,
        shared: Shared,
        tensors: tuple[Tensor, Tensor, Tensor],
    ) -> Head:
        """tensors: ``q (b, h, n, d)``, ``k`` and ``v``; part: a single head."""
        q, k, v = tensors
        return Head(request, part, visibility, shared, part.of_query(q), part.of_key(k), part.of_key(v))

    def rows(self) -> Sequence[Sequence[Tile]]:
        return self.visibility.schedule(self.request.q_bucket_size, self.request.k_bucket_size)

    def start(self, tile: Tile, scores: Tensor, value: Tensor) -> None:
        """Fill the scores that products will be added to with value, bias and what is hidden.

        scores: ``(i, j)``, or as ``shared`` says, transposed. value: of each query, shaped to broadcast.
        """
        scores.copy_(value)
        bias = self.request.bias_tile(tile, self.part)
        if bias is not None:
            scores.add_(bias[0, 0].t() if self.shared.transposed else bias[0, 0], alpha=LOG2_E)
        hidden = self.shared.hidden(self.visibility, tile)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)

    def keep(self, tile: Tile) -> Tensor | None:
        keep = self.request.keep_tile(tile, self.part)
        return None if keep is None else keep[0, 0]


def attend(head: Head, out: Tensor, lse: Tensor) -> None:
    """Write the output ``(n, e)`` and the log-sum-exp ``(n,)`` of the rows that see anything."""
    request, scratch = head.request, head.shared.scratch
    keys, values = _Cache(head.k, False), _Cache(head.v, True)
    for row in each_row(head.rows()):
        if not row:
            continue
        for cache in (keys, values):
            cache.forget_before(row[0].j0)
        queries = _scaled(head.q[row[0].queries], request.scale * LOG2_E)
        total, softmax = queries.new_zeros(len(queries), request.e), _Softmax(queries)
        for tile in each_tile(row):
            weights = scratch.take("scores", len(queries), tile.j1 - tile.j0)
            softmax.add(head, tile, weights, keys.take(tile, len(queries)), total)
            keep = head.keep(tile)
            if keep is not None:
                weights.mul_(keep)
            values.take(tile, len(queries)).add_product(total, weights)
        lse[row[0].queries] = (softmax.top + softmax.mass.log2()).mul_(1 / LOG2_E).squeeze(1)
        survivors = softmax.mass.mul_(1 - request.dropout)
        out[row[0].queries] = total.div_(survivors.masked_fill_(survivors == 0, 1.0))


class _Softmax:
    """One bucket of queries' weights ``2 ** (score - top)``, a tile at a time, and their sums ``mass``, ``(i, 1)``.

    A row's top is its largest score so far, or so far as one tile: later tiles keep it while their weights stay small.
    Then theirs need not be found, and products are added to ``-top``: two passes over a tile fewer. Each row's numbers
    are its own, bit for bit, whatever the other rows hold.
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries
        self.mass, self.top = queries.new_zeros(2, len(queries), 1)
        self.unseen = torch.ones_like(self.top, dtype=torch.bool)
        self.first = True

    def add(self, head: Head, tile: Tile, scores: Tensor, keys: Factor, total: Tensor) -> None:
        """Make this tile's weights of ``scores (i, j)``; what earlier tiles added to ``total (i, e)`` is scaled."""
        higher = torch.ones_like(self.unseen)
        # With a bias scores often rise from tile to tile (ALiBi's do), and all would be computed twice.
        if not self.first and head.request.bias is None and not isinstance(scores, FakeTensor):
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

    def _relative(self, head: Head, tile: Tile, scores: Tensor, keys: Factor) -> None:
        head.start(tile, scores, -self.top)
        keys.add_product(scores, self.queries)


class Incoming(NamedTuple):
    """What backward is given of a head: ``out (n, e)``, ``lse (n,)`` and their gradients."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class Outgoing(NamedTuple):
    """Where its gradients go: q's is written ``(n, d)``, those of k ``(m, d)`` and v ``(m, e)``, contiguous, are added.

    add_bias: called as ``add_bias(tile, part, gradient (1, 1, i, j))`` where the bias wants one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    add_bias: Callable[[Tile, Part, Tensor], None] | None


def differentiate(head: Head, came: Incoming, goes: Outgoing) -> None:
    """The gradients of :func:`attend`."""
    request, scratch = head.request, head.shared.scratch
    survivor_scale = 1 / (1 - request.dropout)
    for row in each_row(head.rows()):
        if not row:
            continue
        here = row[0].queries
        j = row[0].j1 - row[0].j0
        queries, upstream = _scaled(head.q[here], request.scale * LOG2_E), _scaled(came.grad_out[here], 1.0)
        i = len(queries)
        minus_delta = (upstream * came.out[here]).sum(1).neg_()
        if came.grad_lse is not None:
            minus_delta.add_(came.grad_lse[here])
        # A row that sees nothing has weights of exp(score - inf) = 0.
        minus_lse = came.lse[here].masked_fill(came.lse[here] == -math.inf, math.inf).mul_(-LOG2_E)
        operands = (queries, upstream, (queries / LOG2_E).t(), upstream.t())
        by_queries, by_upstream, to_keys, to_values = (Factor(x, length=i, rows=j) for x in operands)
        of_queries = queries.new_zeros(request.d, i)
        for tile in each_tile(row):
            j = tile.j1 - tile.j0
            k, v = head.k[tile.keys], head.v[tile.keys]
            weights, grads = scratch.take("weights", j, i), scratch.take("gradients", j, i)
            head.start(tile, weights, minus_lse)
            by_queries.add_product(weights, scratch.take("keys", *k.shape).copy_(k))
            weights.exp2_()
            keep, values = head.keep(tile), scratch.take("values", *v.shape).copy_(v)
            if keep is None:
                by_upstream.add_product(grads.copy_(minus_delta), values)
                grads.mul_(weights)
            else:
                keep = keep.t().contiguous()
                by_upstream.add_product(grads.zero_(), values)
                grads.mul_(keep).mul_(survivor_scale).add_(minus_delta).mul_(weights)
                weights.mul_(keep).mul_(survivor_scale)
            to_values.add_product(goes.v[tile.keys], weights)
            to_keys.add_product(goes.k[tile.keys], grads)
            of_queries += product(scratch.take("keys", request.d, j).copy_(k.t()), grads.t())
            if goes.add_bias is not None:
                goes.add_bias(tile, head.part, grads.t()[None, None])
        goes.q[here] = of_queries.t().mul_(request.scale)


class _Cache:
    """Buckets of keys, or of values transposed, ready to be multiplied by, while rows to come may see them."""

    def __init__(self, tensor: Tensor, transposed: bool) -> None:
        self.tensor, self.transposed = tensor, transposed
        self.kept: dict[int, tuple[int, Factor]] = {}

    def take(self, tile: Tile, rows: int) -> Factor:
        end, factor = self.kept.get(tile.j0, (0, None))
        if factor is None or end != tile.j1:
            part = self.tensor[tile.keys]
            factor = Factor(part.t() if self.transposed else part, length=len(part), rows=rows)
            self.kept[tile.j0] = tile.j1, factor
        return factor

    def forget_before(self, key: int) -> None:
        self.kept = {start: found for start, found in self.kept.items() if start >= key}


def _scaled(rows: Tensor, factor: float) -> Tensor:
    """fp32, contiguous."""
    return rows.float().mul(factor).contiguous()
