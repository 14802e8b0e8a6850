"""The executable definition: the whole score matrix, no tiles. All other ways are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.precision import full_precision
from .log_sum_exp import finite
from .request import ROUNDED_AWAY, AttentionRequest
from .tiles import Scores, parts, tiles
from .way import Way


class Naive(Way):
    r"""Computes ``softmax(scale · q kᵀ + bias)`` over the visible keys, with dropout, times v; O(n·m) memory.

    A row that sees nothing has output 0 and log-sum-exp −∞.
    """

    name = backend = "naive"
    merit = "the definition itself"
    by_autograd = True

    def drawback(self, request: AttentionRequest) -> str | None:
        return "holds all n × m scores"

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        with full_precision(q.device):
            dtype = request.compute_dtype
            group = request.h // request.kv
            keys, values = (t.to(dtype).repeat_interleave(group, dim=1) for t in (k, v))
            scores = q.to(dtype) @ keys.mT * request.scale
            everything = Scores.all_of(request)
            bias, visible = everything.bias if request.n and request.m else None, everything.visible
            level = None
            if bias is not None:
                # Scores relative to the largest bias a row sees, beside which fp32 would round them away; beyond
                # ROUNDED_AWAY fp64 would too, so there the scores count as equal.
                seen_bias = bias.detach() if visible is None else bias.detach().masked_fill(~visible, float("-inf"))
                level = finite(seen_bias.to(dtype).amax(dim=-1, keepdim=True))
                scores = torch.where(level.abs() < ROUNDED_AWAY, scores, scores - scores.detach())
                scores = scores + (bias.to(dtype) - level)
            if everything.is_modified:
                scores = everything.modified(scores)
            if visible is not None:
                scores = scores.masked_fill(~visible, float("-inf"))
            # A row of −∞ has no softmax: take it from finite scores and set it to zero.
            seen = (scores != float("-inf")).any(dim=-1, keepdim=True)
            scores = scores.masked_fill(~seen, 0.0)
            probabilities = scores.softmax(dim=-1).masked_fill(~seen, 0.0)
            if visible is not None:
                # The gradient of a hidden score may be infinite.
                probabilities = probabilities.masked_fill(~visible, 0.0)
            if request.dropout:
                probabilities = probabilities * _survivors(request) / (1 - request.dropout)
            lse = scores.logsumexp(dim=-1).masked_fill(~seen.squeeze(-1), float("-inf"))
            lse = lse if level is None else lse + level.squeeze(-1)
            return (probabilities @ values).to(v.dtype), lse


def _survivors(request: AttentionRequest) -> Tensor:
    """Return the dropout masks of all tiles side by side: bool ``(b, h, n, m)``."""
    keep = torch.ones(request.score_shape, dtype=torch.bool, device=request.device)
    for part in parts(request):
        for row in part.rows(request):
            for tile in tiles(row):
                survivors = Scores(request, part, tile).survivors
                assert survivors is not None
                keep[part.batch, part.heads, tile.queries, tile.keys] = survivors
    return keep
