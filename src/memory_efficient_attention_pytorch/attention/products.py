"""Compute tiles by plain matrix products: every request, on any device."""

from __future__ import annotations

from torch import Tensor

from .log_sum_exp import LogSumExp, finite, rounded_away
from .tiles import QueryBucket, Scores, Tiled, TileGradients


class Products(Tiled):
    """Computes tiles by PyTorch's operators, for as many heads at once as fit in the device's cache."""

    name = "products"
    merit = "computes every request in linear memory"

    def attend(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, LogSumExp]:
        request = scores.request
        dtype = request.compute_dtype
        weights = _products(scores, q.to(dtype), k.to(dtype))
        if scores.is_modified:
            weights = scores.modified(weights).clone()  # the function may return a tensor that it captures
        level = _add_and_hide(scores, weights, scores.visible)
        top = finite(weights.amax(dim=-1, keepdim=True))
        weights = weights.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        lse = LogSumExp.of(total.log().squeeze(-1), *(x.squeeze(-1) for x in (level, top) if x is not None))
        survivors = scores.survivors
        if survivors is not None:
            weights.mul_(survivors)
        out = _unfold(_fold(weights, v) @ v.to(dtype), weights)
        mass = total * (1 - request.dropout)
        return out.div_(mass.masked_fill_(mass == 0, 1.0)), lse

    def differentiate(self, scores: Scores, bucket: QueryBucket, k: Tensor, v: Tensor) -> TileGradients:
        request = scores.request
        q, grad_out, keys, values = (x.to(request.compute_dtype) for x in (bucket.q, bucket.grad_out, k, v))
        weights, visible = _products(scores, q, keys), scores.visible
        if scores.is_modified:
            raw = weights
            modified = scores.modified(raw, bucket.bias_gradient)
            weights = modified.detach().clone()
        for part in bucket.above(_add_and_hide(scores, weights, visible)):
            if part is not None:
                weights.sub_(part)
        weights.exp_()
        survivors, survivor_scale = scores.survivors, 1 / (1 - request.dropout)
        grad_weights = _unfold(_fold(grad_out, values) @ values.mT, grad_out)
        if survivors is not None:
            grad_weights.mul_(survivors).mul_(survivor_scale)
        grad_scores = grad_weights.sub_(bucket.delta.unsqueeze(-1)).mul_(weights)
        if survivors is not None:
            weights.mul_(survivors).mul_(survivor_scale)
        if scores.is_modified:
            grad_scores = bucket.bias_gradient.through(modified, raw, grad_scores)
        if visible is not None and (scores.is_modified or not request.moderate):
            # Hidden scores contribute nothing, even where the function's slope or a product is not finite.
            grad_scores.masked_fill_(~visible, 0.0)
        grad_v = _fold(weights, values).mT @ _fold(grad_out, values)
        folded = _fold(grad_scores, keys)
        grad_q = _unfold(folded @ keys, q).mul_(request.scale)
        grad_k = (folded.mT @ _fold(q, keys)).mul_(request.scale)
        return grad_q, grad_k, grad_v, None if scores.is_modified else grad_scores


def _products(scores: Scores, q: Tensor, k: Tensor) -> Tensor:
    """Return ``scale · q kᵀ``."""
    return _unfold(_fold(q * scores.request.scale, k) @ k.mT, q)


def _add_and_hide(scores: Scores, values: Tensor, visible: Tensor | None) -> Tensor | None:
    """Add biases less each row's level to the scores and hide what is masked; return the level, None without biases."""
    biased = scores.request.bias is not None and not scores.is_modified
    added, level = scores.relative(values.dtype, visible) if biased else (None, None)
    if added is not None and level is not None:
        rows = rounded_away(level)
        if rows is not None:
            values.masked_fill_(rows, 0.0)
        values.add_(added)
    if visible is not None:
        values.masked_fill_(~visible, float("-inf"))
    return level


def _fold(queries: Tensor, keys: Tensor) -> Tensor:
    """Reshape ``(b, h, i, x)`` to ``(b, kv, g·i, x)``: queries that share a key/value head are rows of one product."""
    b, h, i, x = queries.shape
    kv = keys.shape[1]
    return queries if h == kv else queries.reshape(b, kv, h // kv * i, x)


def _unfold(folded: Tensor, queries: Tensor) -> Tensor:
    """Undo :func:`_fold`, for the heads and rows of ``queries``."""
    b, h, i, _ = queries.shape
    return folded.reshape(b, h, i, folded.shape[-1])
