"""The executable definition: the whole score matrix, no tiles. Every other path is held to this one."""

from __future__ import annotations

import torch
from torch import Tensor

from .request import AttentionRequest, Part, full_precision
from .visibility import Tile, each_row, each_tile


def attention(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""``softmax(scale · q kᵀ + bias)`` over the visible keys, dropped out, times v; O(n·m) memory.

    q ``(b, h, n, d)``, k ``(b, kv, m, d)``, v ``(b, kv, m, e)`` → output ``(b, h, n, e)`` in v's dtype and the
    log-sum-exp of each row ``(b, h, n)`` in the compute dtype, −∞ for a row that sees nothing (its output is 0).
    """
    with full_precision(q.device):
        dtype = request.compute_dtype
        group = request.h // request.kv
        keys, values = (t.to(dtype).repeat_interleave(group, dim=1) for t in (k, v))
        scores = q.to(dtype) @ keys.mT * request.scale
        everything = Tile(0, request.n, 0, request.m, request.visibility.trivial)
        bias = request.bias_tile(everything, Part(slice(None), slice(None), slice(None)))
        if bias is not None:
            scores = scores + bias.to(dtype)
        visible = request.visibility.tile_mask(everything, q.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        # A row of −∞ has no softmax: take it from finite scores and set it to zero.
        seen = (scores != float("-inf")).any(dim=-1, keepdim=True)
        scores = scores.masked_fill(~seen, 0.0)
        probabilities = scores.softmax(dim=-1).masked_fill(~seen, 0.0)
        if request.dropout:
            probabilities = probabilities * _keep(request, q.device) / (1 - request.dropout)
        return (probabilities @ values).to(v.dtype), scores.logsumexp(dim=-1).masked_fill(
            ~seen.squeeze(-1), float("-inf")
        )


def _keep(request: AttentionRequest, device: torch.device) -> Tensor:
    """The tiles' dropout masks, side by side."""
    keep = torch.ones(request.score_shape, dtype=torch.bool, device=device)
    for part in request.parts():
        visibility = request.visibility.narrow(part.batch, part.heads)
        for row in each_row(visibility.schedule(request.q_bucket_size, request.k_bucket_size)):
            for tile in each_tile(row):
                survivors = request.keep_tile(tile, part)
                assert survivors is not None
                keep[part.batch, part.heads, tile.queries, tile.keys] = survivors
    return keep
