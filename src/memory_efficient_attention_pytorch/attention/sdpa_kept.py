"""PyTorch's fused kernels by their own operators, which give the log-sum-exp: kept, it saves a second forward.

``scaled_dot_product_attention`` runs the same operators and keeps the log-sum-exp to itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..common.gradients import once_differentiable
from ..common.recording import Found
from . import sdpa as fused
from .request import AttentionRequest

_aten = torch.ops.aten
ALIGNMENT = 8  # what the CUDA kernels ask of a width, in elements


def kernel_for(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """``"cpu"``, ``"flash"`` or ``"efficient"``; None where none of them takes the tensors as they are.

    To be asked only where :func:`fused.reason_against` has no objection.
    """
    if request.device.type == "cpu":
        return "cpu"
    if request.device.type != "cuda" or request.d % ALIGNMENT:
        return None
    added, grouped = _added(request), request.h != request.kv
    half = request.dtype in (torch.float16, torch.bfloat16)
    if isinstance(q, FakeTensor):
        flash, efficient = half and added is None, not grouped
    else:
        q, k, v = fused.unit_stride(q, k, v)
        params = torch.backends.cuda.SDPAParams(q, k, v, added, 0.0, fused.is_causal(request), grouped)
        flash = torch.backends.cuda.can_use_flash_attention(params)
        efficient = torch.backends.cuda.can_use_efficient_attention(params)
    if flash:
        return "flash"
    return "efficient" if efficient else None


def find(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """Output ``(b, h, n, e)``, the log-sum-exp and what else the kernel's backward asks for: for :func:`again`."""
    with torch.no_grad():
        q, k, v = fused.unit_stride(q, k, v)
        kernel, added = kernel_for(request, q, k, v), _added(request)
        causal, scale = fused.is_causal(request), request.scale
        if kernel == "cpu":
            attention = _aten._scaled_dot_product_flash_attention_for_cpu
            return Found(kernel, tuple(attention(q, k, v, 0.0, causal, attn_mask=added, scale=scale)))
        if kernel == "flash":
            attention = _aten._scaled_dot_product_flash_attention
            out, lse, _, _, _, _, seed, offset, _ = attention(q, k, v, 0.0, causal, False, scale=scale)
            return Found(kernel, (out, lse, seed, offset))
        attention = _aten._scaled_dot_product_efficient_attention
        return Found("efficient", tuple(attention(q, k, v, added, True, 0.0, causal, scale=scale)))


def again(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, found: Found) -> Tensor:
    """The output that :func:`find` found for the same arguments, with the gradients of q, k and v; nothing is computed.

    Differentiable once.
    """
    q, k, v = fused.unit_stride(q, k, v)
    return _FusedAgain.apply(found, fused.is_causal(request), request.scale, _added(request), q, k, v)


class _FusedAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: Found, causal: bool, scale: float, added: Tensor | None, *heads: Tensor) -> Tensor:
        ctx.kernel, ctx.causal, ctx.scale = found.by, causal, scale
        ctx.save_for_backward(added, *heads, *found.tensors)
        return found.tensors[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        added, q, k, v, out, lse, *state = ctx.saved_tensors
        causal, scale = ctx.causal, ctx.scale
        (grad_out,) = fused.unit_stride(grad_out)
        if ctx.kernel == "cpu":
            backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
            gradients = backward(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scale)
        elif ctx.kernel == "flash":
            backward = _aten._scaled_dot_product_flash_attention_backward
            lengths = (None, None, q.shape[2], k.shape[2])
            gradients = backward(grad_out, q, k, v, out, lse, *lengths, 0.0, causal, *state, scale=scale)
        else:
            backward = _aten._scaled_dot_product_efficient_attention_backward
            wanted = [True, True, True, False]
            gradients = backward(grad_out, q, k, v, added, out, lse, *state, 0.0, wanted, causal, scale=scale)[:3]
        return None, None, None, None, *gradients


def _added(request: AttentionRequest) -> Tensor | None:
    """Mask or bias as a tensor added to the scores, laid out as the CUDA kernel wants it."""
    added = fused._added(request)
    if added is None:
        return None
    if added.dtype == torch.bool:
        added = torch.zeros_like(added, dtype=request.dtype).masked_fill_(~added, float("-inf"))
    if request.device.type == "cpu":
        return added
    padded = F.pad(added.expand(*added.shape[:-1], request.m), (0, -request.m % ALIGNMENT))
    return padded[..., : request.m].to(request.dtype).expand(request.score_shape)
