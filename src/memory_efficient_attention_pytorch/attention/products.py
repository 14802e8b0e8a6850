"""Tiles by matrix products: whatever is asked, on any device."""

from __future__ import annotations

from torch import Tensor

from .tiles import QueryBucket, Scores, Tiled, TileGradients


class Products(Tiled):
    """PyTorch's own operators on a tile of as many heads as stay in the device's cache."""

    name = "products"
    merit = "serves every request in linear memory"

    def attend(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        request = scores.request
        dtype = request.compute_dtype
        weights = _products(scores, q.to(dtype), k.to(dtype))
        if scores.is_modified:
            weights = scores.modified(weights).clone()  # it may be a tensor that the function captures
        _add_and_hide(scores, weights)
        top = weights.amax(dim=-1, keepdim=True)
        top.masked_fill_(top == float("-inf"), 0.0)
        weights = weights.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        lse = (top + total.log()).squeeze(-1)
        survivors = scores.survivors
        if survivors is not None:
            weights.mul_(survivors)
        out = _unfold(_fold(weights, v) @ v.to(dtype), weights)
        mass = total * (1 - request.dropout)
        return out.div_(mass.masked_fill_(mass == 0, 1.0)), lse

    def differentiate(self, scores: Scores, bucket: QueryBucket, k: Tensor, v: Tensor) -> TileGradients:
        request = scores.request
        q, grad_out, keys, values = (x.to(request.compute_dtype) for x in (bucket.q, bucket.grad_out, k, v))
        weights = raw = _products(scores, q, keys)
        if scores.is_modified:
            modified = scores.modified(raw, bucket.bias_gradient)
            weights = modified.detach().clone()
        _add_and_hide(scores, weights)
        weights.sub_(bucket.lse.unsqueeze(-1)).exp_()
        survivors, survivor_scale = scores.survivors, 1 / (1 - request.dropout)
        grad_weights = _unfold(_fold(grad_out, values) @ values.mT, grad_out)
        if survivors is not None:
            grad_weights.mul_(survivors).mul_(survivor_scale)
        grad_scores = grad_weights.sub_(bucket.delta.unsqueeze(-1)).mul_(weights)
        if survivors is not None:
            weights.mul_(survivors).mul_(survivor_scale)
        if scores.is_modified:
            grad_scores = bucket.bias_gradient.through(modified, raw, grad_scores)
            # A score that nobody sees counts for nothing, even where the function has no finite slope.
            _hide(scores, grad_scores, 0.0)
        grad_v = _fold(weights, values).mT @ _fold(grad_out, values)
        folded = _fold(grad_scores, keys)
        grad_q = _unfold(folded @ keys, q).mul_(request.scale)
        grad_k = (folded.mT @ _fold(q, keys)).mul_(request.scale)
        return grad_q, grad_k, grad_v, None if scores.is_modified else grad_scores


def _products(scores: Scores, q: Tensor, k: Tensor) -> Tensor:
    """``scale · q kᵀ``."""
    return _unfold(_fold(q * scores.request.scale, k) @ k.mT, q)


def _add_and_hide(scores: Scores, values: Tensor) -> None:
    bias = scores.bias
    if bias is not None:
        values.add_(bias)
    _hide(scores, values, float("-inf"))


def _hide(scores: Scores, values: Tensor, by: float) -> None:
    visible = scores.visible
    if visible is not None:
        values.masked_fill_(~visible, by)


def _fold(queries: Tensor, keys: Tensor) -> Tensor:
    """``(b, h, i, x)`` → ``(b, kv, g·i, x)``: the queries that share a key/value head, as rows of one product."""
    b, h, i, x = queries.shape
    kv = keys.shape[1]
    return queries if h == kv else queries.reshape(b, kv, h // kv * i, x)


def _unfold(folded: Tensor, queries: Tensor) -> Tensor:
    """The inverse of :func:`_fold`, for the heads and rows of ``queries``."""
    b, h, i, _ = queries.shape
    return folded.reshape(b, h, i, folded.shape[-1])
