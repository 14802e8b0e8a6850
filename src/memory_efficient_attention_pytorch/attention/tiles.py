"""Attention one tile of scores at a time: memory linear in n and m whatever is asked.

The online softmax of Milakov & Gimelshein (2018), the order of Rabe & Staats, "Self-attention does not need O(n²)
memory" (2021), and the backward pass of Dao et al., "FlashAttention" (2022): what is kept for backward is the output
and each row's log-sum-exp, and every tile is computed again from q and k.

A tile is computed by oneDNN where that is faster (``onednn_tiles``), by PyTorch's fused CPU kernel where that computes
exactly what is asked, else by matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.dry_run import each
from ..common.gradients import once_differentiable
from ..common.recording import Found
from . import onednn as onednn_tiles
from .onednn import Head, Incoming, Outgoing, Shared
from .request import AttentionRequest, Part, full_precision
from .sdpa import unit_stride
from .visibility import Tile, Visibility, each_row, each_tile

# Fused tiles hold no scores, so a part is the whole batch.
WHOLE = 2**62

_fused_tile = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_tile_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attention(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``(b, h, n, e)`` in v's dtype and log-sum-exp ``(b, h, n)``; see :func:`naive.attention` for the meaning.

    Differentiable once in q, k, v, the bias (tensor or module's parameters) and through the log-sum-exp.
    """
    return _apply(request, None, q, k, v)


def find(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """:func:`attention` without gradients, to be kept for :func:`again`."""
    with torch.no_grad():
        return Found("tiled", attention(request, q, k, v))


def again(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Tensor:
    """The output of :func:`attention`, which :func:`find` found, with its gradients."""
    return _apply(request, found.tensors, q, k, v)[0]


def _apply(
    request: AttentionRequest, found: tuple[Tensor, ...] | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    bias = request.bias if isinstance(request.bias, Tensor) else None
    visibility = request.visibility
    tensors = (q, k, v, visibility.mask, visibility.document_ids, bias, *request.bias_parameters)
    out, lse = _TiledAttention.apply(request.without_tensors(), found, *tensors)
    return out, lse


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, request: AttentionRequest, found: tuple[Tensor, ...] | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v, mask, document_ids, bias, *parameters = tensors
        if found is None:
            with full_precision(q.device):
                request = request.with_tensors(mask, document_ids, bias)
                out, lse = _forward(request, q, k, v)
        else:
            out, lse = (t.detach() for t in found)
        ctx.request = request.without_tensors()
        ctx.save_for_backward(q, k, v, out, lse, mask, document_ids, bias, *parameters)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, document_ids, bias, *parameters = ctx.saved_tensors
        request = ctx.request.with_tensors(mask, document_ids, bias)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        with full_precision(q.device):
            gradients = _Gradients.like(request, q, k, v, bias, parameters, ctx.needs_input_grad[7:])
            _backward(request, gradients, q, k, v, out, lse, grad_out, grad_lse)
        wanted = (gradients.q.to(q.dtype), gradients.k.to(k.dtype), gradients.v.to(v.dtype))
        of_bias = None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype)
        pairs = zip(gradients.bias_parameters, parameters, strict=True)
        return (None, None, *wanted, None, None, of_bias, *(g if g is None else g.to(p.dtype) for g, p in pairs))


@dataclass
class _Gradients:
    """Accumulators in the compute dtype; ``bias`` keeps the tensor's own broadcast shape."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    parameters: list[Tensor]
    bias_parameters: list[Tensor | None]

    @staticmethod
    def like(
        request: AttentionRequest,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        parameters: list[Tensor],
        needed: tuple[bool, ...],
    ) -> _Gradients:
        """``needed``: for the bias tensor and then for each parameter of the bias module."""
        dtype = request.compute_dtype
        of_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needed[0] else None
        of_parameters = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, dtype)) if need else None
            for p, need in zip(parameters, needed[1:], strict=True)
        ]
        # A query's gradient is finished in one go; keys' and values' are summed over all buckets of queries.
        of_q = torch.zeros_like(q)
        # oneDNN adds to what has no gaps: each head's gradient in one piece, not each token's.
        order = torch.contiguous_format if request.onednn else torch.preserve_format
        of_k, of_v = (torch.zeros_like(x, dtype=dtype, memory_format=order) for x in (k, v))
        return _Gradients(of_q, of_k, of_v, of_bias, parameters, of_parameters)

    @property
    def wants_bias(self) -> bool:
        return self.bias is not None or any(g is not None for g in self.bias_parameters)

    def of_head(self, request: AttentionRequest, part: Part) -> Outgoing:
        """Where one query head's gradients go."""
        q, k, v = part.of_query(self.q), part.of_key(self.k), part.of_key(self.v)
        return Outgoing(q, k, v, partial(self.add_bias, request) if self.wants_bias else None)

    def add_bias(self, request: AttentionRequest, tile: Tile, part: Part, grad_scores: Tensor) -> None:
        if self.bias is not None:
            target = request.with_tensors(None, None, self.bias).bias_tile(tile, part)
            assert target is not None
            target += grad_scores.sum_to_size(target.shape)
            return
        wanted = [i for i, g in enumerate(self.bias_parameters) if g is not None]
        with torch.enable_grad():
            values = request.bias_tile(tile, part)
        assert values is not None
        leaves = [self.parameters[i] for i in wanted]
        cotangent = grad_scores.sum_to_size(values.shape).to(values.dtype)
        for i, grad in zip(wanted, torch.autograd.grad(values, leaves, cotangent, allow_unused=True), strict=True):
            if grad is not None:
                total = self.bias_parameters[i]
                assert total is not None
                total += grad


def _forward(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # Token-major in memory, so that merging the heads afterwards is a view.
    out = v.new_zeros(request.b, request.n, request.h, request.e).transpose(1, 2)
    lse = q.new_full((request.b, request.h, request.n), float("-inf"), dtype=request.compute_dtype)
    if request.onednn:
        shared = Shared(request.device, transposed=False)
        for part, visibility in each(_parts(request, None)):
            head = Head.of(request, part, visibility, shared, (q, k, v))
            onednn_tiles.attend(head, part.of_query(out), part.of_query(lse))
        return out, lse
    fused = _fused_tile_serves(request)
    for part, visibility in each(_parts(request, WHOLE if fused else None)):
        keys, values = k[part.batch, part.kv_heads], v[part.batch, part.kv_heads]
        for row in each_row(visibility.schedule(request.q_bucket_size, request.k_bucket_size)):
            merged: tuple[Tensor, Tensor] | None = None
            for tile in each_tile(row):
                queries = q[part.batch, part.heads, tile.queries]
                operands = (queries, keys[:, :, tile.keys], values[:, :, tile.keys])
                scores = _Scores(request, tile, part, visibility, fused)
                found = scores.fused(*operands) if fused else scores.attend(*operands)
                merged = found if merged is None else _merge(*merged, *found)
            if merged is not None:
                rows = row[0].queries
                out[part.batch, part.heads, rows], lse[part.batch, part.heads, rows] = merged
    return out, lse


def _backward(
    request: AttentionRequest,
    gradients: _Gradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> None:
    if request.onednn:
        shared = Shared(request.device, transposed=True)
        for part, visibility in each(_parts(request, None)):
            head = Head.of(request, part, visibility, shared, (q, k, v))
            of_lse = None if grad_lse is None else part.of_query(grad_lse)
            came = Incoming(part.of_query(out), part.of_query(lse), part.of_query(grad_out), of_lse)
            onednn_tiles.differentiate(head, came, gradients.of_head(request, part))
        return
    fused = _fused_tile_serves(request) and grad_lse is None and not gradients.wants_bias
    for part, visibility in each(_parts(request, WHOLE if fused else None)):
        keys, values = k[part.batch, part.kv_heads], v[part.batch, part.kv_heads]
        grad_k, grad_v = gradients.k[part.batch, part.kv_heads], gradients.v[part.batch, part.kv_heads]
        for row in each_row(visibility.schedule(request.q_bucket_size, request.k_bucket_size)):
            if not row:
                continue
            here = (part.batch, part.heads, row[0].queries)
            state = _Row.of(
                request, q[here], out[here], lse[here], grad_out[here], None if grad_lse is None else grad_lse[here]
            )
            for tile in each_tile(row):
                scores = _Scores(request, tile, part, visibility, fused)
                operands = (keys[:, :, tile.keys], values[:, :, tile.keys])
                dq, dk, dv, ds = (
                    scores.fused_backward(state, *operands) if fused else scores.differentiate(state, *operands)
                )
                state.grad_q += dq
                grad_k[:, :, tile.keys] += dk
                grad_v[:, :, tile.keys] += dv
                if gradients.wants_bias and ds is not None:
                    gradients.add_bias(request, tile, part, ds)
            gradients.q[here] = state.grad_q


def _parts(request: AttentionRequest, elements: int | None) -> list[tuple[Part, Visibility]]:
    """The request's parts, of so many scores a tile (product tiles: as many as stay in cache)."""
    return [(part, request.visibility.narrow(part.batch, part.heads)) for part in request.parts(elements)]


def _fused_tile_serves(request: AttentionRequest) -> bool:
    """PyTorch's CPU kernel computes a tile exactly: no dropout, equal widths (a bias gradient is asked in backward)."""
    return request.device.type == "cpu" and not request.dropout and request.d == request.e


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys from the attention over each."""
    total = torch.logaddexp(lse, other_lse)
    finite = total.masked_fill(total == float("-inf"), 0.0)
    mine, others = (torch.exp(part - finite).unsqueeze(-1) for part in (lse, other_lse))
    return out * mine + other * others, total


@dataclass
class _Row:
    """A bucket of queries on the way back, in the compute dtype except ``fused``, the fused kernel's own operands."""

    q: Tensor
    grad_out: Tensor
    lse: Tensor
    delta: Tensor
    grad_q: Tensor
    fused: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def of(
        request: AttentionRequest, q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> _Row:
        dtype = request.compute_dtype
        grad = grad_out.to(dtype)
        delta = (grad * out).sum(dim=-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        # exp(score − lse) must be 0, not NaN, in a row that sees nothing.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        return _Row(q.to(dtype), grad, lse, delta, torch.zeros_like(q, dtype=dtype), (q, out, grad_out.to(q.dtype)))


@dataclass
class _Scores:
    """One tile of scores: what is added to it, what it may see, what dropout keeps."""

    request: AttentionRequest
    tile: Tile
    part: Part
    visibility: Visibility
    fused_kernel: bool

    def __post_init__(self) -> None:
        request, tile, part = self.request, self.tile, self.part
        self.visible = self.visibility.tile_mask(tile, request.device)
        self.bias = request.bias_tile(tile, part)
        self.keep = request.keep_tile(tile, part)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised output of this tile alone ``(b, h, i, e)`` and its log-sum-exp ``(b, h, i)``."""
        dtype = self.request.compute_dtype
        scores = self._scores(q.to(dtype), k.to(dtype))
        top = scores.amax(dim=-1, keepdim=True)
        top.masked_fill_(top == float("-inf"), 0.0)
        weights = scores.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        lse = (top + total.log()).squeeze(-1)
        if self.keep is not None:
            weights.mul_(self.keep)
        out = _unfold(_fold(weights, v) @ v.to(dtype), weights)
        survivors = total * (1 - self.request.dropout)
        return out.div_(survivors.masked_fill_(survivors == 0, 1.0)), lse

    def differentiate(self, row: _Row, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This tile's part of the gradients of q, k and v, and the gradient of its scores ``(b, h, i, j)``."""
        dtype = self.request.compute_dtype
        keys, values = k.to(dtype), v.to(dtype)
        weights = self._scores(row.q, keys).sub_(row.lse.unsqueeze(-1)).exp_()
        survivor_scale = 1 / (1 - self.request.dropout)
        grad_weights = _unfold(_fold(row.grad_out, values) @ values.mT, row.grad_out)
        if self.keep is not None:
            grad_weights.mul_(self.keep).mul_(survivor_scale)
        grad_scores = grad_weights.sub_(row.delta.unsqueeze(-1)).mul_(weights)
        if self.keep is not None:
            weights.mul_(self.keep).mul_(survivor_scale)
        grad_v = _fold(weights, values).mT @ _fold(row.grad_out, values)
        folded = _fold(grad_scores, keys)
        grad_q = _unfold(folded @ keys, row.q).mul_(self.request.scale)
        grad_k = (folded.mT @ _fold(row.q, keys)).mul_(self.request.scale)
        return grad_q, grad_k, grad_v, grad_scores

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`attend` by PyTorch's kernel."""
        added = self._added()
        q, k, v = unit_stride(q, k, v)
        out, lse = _fused_tile(q, k, v, attn_mask=added, scale=self.request.scale)
        if added is not None:
            # The kernel leaves a finite log-sum-exp on a row that sees nothing here.
            lse = lse.masked_fill((added == float("-inf")).all(dim=-1), float("-inf"))
        return out.to(self.request.compute_dtype), lse

    def fused_backward(self, row: _Row, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """:meth:`differentiate` by PyTorch's kernel: a tile's part is exact given the whole row's output."""
        q, out, grad_out = row.fused
        added = self._added()
        scale = self.request.scale
        grad_out, q, k, v = unit_stride(grad_out, q, k, v)
        grads = _fused_tile_backward(grad_out, q, k, v, out, row.lse, 0.0, False, attn_mask=added, scale=scale)
        return (*grads, None)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = _unfold(_fold(q * self.request.scale, k) @ k.mT, q)
        if self.bias is not None:
            scores.add_(self.bias)
        if self.visible is not None:
            scores.masked_fill_(~self.visible, float("-inf"))
        return scores

    def _added(self) -> Tensor | None:
        """Bias and mask as one tensor added to the scores, the form that the kernel takes."""
        dtype = self.request.compute_dtype
        if self.visible is None:
            return None if self.bias is None else self.bias.to(dtype)
        if self.bias is None:
            hidden = torch.zeros((), dtype=dtype, device=self.visible.device)
            return torch.where(self.visible, hidden, float("-inf"))
        return torch.where(self.visible, self.bias.to(dtype), float("-inf"))


def _fold(queries: Tensor, keys: Tensor) -> Tensor:
    """``(b, h, i, x)`` → ``(b, kv, g·i, x)``: the queries that share a key/value head, as rows of one product."""
    b, h, i, x = queries.shape
    kv = keys.shape[1]
    return queries if h == kv else queries.reshape(b, kv, h // kv * i, x)


def _unfold(folded: Tensor, queries: Tensor) -> Tensor:
    """The inverse of :func:`_fold`, for the heads and rows of ``queries``."""
    b, h, i, _ = queries.shape
    return folded.reshape(b, h, i, folded.shape[-1])
