"""PyTorch's own fused kernels, where they compute exactly what is asked without an n × m tensor of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .request import AttentionRequest, Part
from .visibility import Tile


def attention(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output ``(b, h, n, e)`` of PyTorch's ``scaled_dot_product_attention``; see ``naive`` for the meaning.

    Only for requests to which :func:`reason_against` has no objection.
    """
    q, k, v = unit_stride(q, k, v)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_added(request),
        is_causal=is_causal(request),
        scale=request.scale,
        enable_gqa=request.h != request.kv,
    )


def reason_against(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the fused kernels cannot serve this request; None when they can."""
    visibility = request.visibility
    if request.return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    if request.dropout:
        return "dropout: the kernels draw other masks than the tiles, and on a CPU they hold the whole score matrix"
    if request.d != request.e:
        return f"q and v differ in width ({request.d} and {request.e})"
    if visibility.document_ids is not None:
        return "document_ids need a mask of n × m"
    structured = not (visibility.with_tensors(None, None).trivial or visibility.plain_causal)
    if structured:
        return "the window, or causality together with a mask or with unequal lengths, needs a mask of n × m"
    if request.bias is not None:
        if not isinstance(request.bias, Tensor) and request.n > 1:
            return "a bias module would have to be evaluated for all n × m positions at once"
        if request.bias_needs_grad or getattr(request.bias, "requires_grad", False):
            # Under no_grad, too: else a forward pass and its repetition for backward would differ in their last bits.
            return "where the bias wants a gradient, PyTorch holds the whole score matrix"
        if not visibility.trivial and request.n > 1:
            return "bias and mask or causality together need a mask of n × m"
        if isinstance(request.bias, Tensor) and request.bias.dtype != request.dtype:
            return f"the bias's dtype {request.bias.dtype} is not that of q, {request.dtype}"
    return _no_kernel(request, q, k, v)


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies where the last dimension is not contiguous: the CPU kernel takes for granted that it is."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def is_causal(request: AttentionRequest) -> bool:
    """Is the kernels' own causality asked for?"""
    return request.visibility.plain_causal and not request.visibility.trivial


def _added(request: AttentionRequest) -> Tensor | None:
    """What the kernels are given as ``attn_mask``: a bool mask, or a bias."""
    if request.bias is None:
        return request.visibility.mask
    if request.n > 1:
        assert isinstance(request.bias, Tensor)
        return request.bias
    # A single query's bias is one row: it may come from a module, and meet a mask.
    everything = Tile(0, 1, 0, request.m, request.visibility.trivial)
    row = request.bias_tile(everything, Part(slice(None), slice(None), slice(None)))
    assert row is not None
    bias = row.to(request.compute_dtype)
    visible = request.visibility.tile_mask(everything, request.device)
    return bias if visible is None else torch.where(visible, bias, float("-inf"))


def _no_kernel(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    device = request.device.type
    if device not in ("cpu", "cuda"):
        return f"no fused kernel with a backward pass is known for device type {device!r}"
    if request.b == 0 or request.n == 0 or request.m == 0:
        return "there is nothing to attend"
    if device == "cpu":
        return None
    if isinstance(q, FakeTensor):
        return None if request.dtype != torch.float64 else "no CUDA kernel for float64"
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(q, k, v, _added(request), 0.0, is_causal(request), request.h != request.kv)
    fits = cuda.can_use_flash_attention(params) or cuda.can_use_efficient_attention(params)
    return None if fits else f"no CUDA kernel takes {request.dtype}, width {request.d} with these arguments"
