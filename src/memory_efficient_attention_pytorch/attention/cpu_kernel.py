"""Tiles by PyTorch's fused CPU kernel: as fast as it is, for masks and windows that it cannot be asked for as a whole.

A tile's mask goes in as an additive tensor.
"""

from __future__ import annotations

from torch import Tensor

from ..torch_internals import attention_kernels
from . import tiles
from .bias import BiasGradient
from .products import Products
from .request import AttentionRequest
from .tiles import WHOLE_BATCH, QueryBucket, Saved, Scores, TileGradients, Upstream, parts
from .way import Way


class CpuKernel(Way):
    """The kernel holds no scores, so a part is the whole batch."""

    name, backend = "cpu_kernel", "tiled"
    merit = "PyTorch's fused kernel computes each tile, in linear memory"

    def __init__(self) -> None:
        self._products = Products()

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if request.device_type != "cpu":
            return f"it is for the CPU, not for {request.device_type}"
        if request.dropout:
            return "it drops nothing of a tile"
        if request.d != request.e:
            return f"q and v differ in width ({request.d} and {request.e})"
        return "this PyTorch does not have it" if attention_kernels.cpu_kernel() is None else None

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tiles.attend(self, parts(request, WHOLE_BATCH), request, q, k, v)

    def backward(
        self, request: AttentionRequest, saved: Saved, upstream: Upstream, bias_gradient: BiasGradient
    ) -> tuple[Tensor, Tensor, Tensor]:
        if upstream.lse is not None or bias_gradient.wanted:
            # It takes no gradient of the log-sum-exp and gives none of the scores.
            return self._products.backward(request, saved, upstream, bias_gradient)
        return tiles.differentiate(self, parts(request, WHOLE_BATCH), request, saved, upstream, bias_gradient)

    def attend(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`tiles.TileKernel`."""
        kernel = attention_kernels.cpu_kernel()
        assert kernel is not None
        dtype = scores.request.compute_dtype
        added = scores.added(dtype)
        out, lse = kernel.forward(*unit_stride(q, k, v), attn_mask=added, scale=scores.request.scale)
        if added is not None:
            # The kernel leaves a finite log-sum-exp on a row that sees nothing here.
            lse = lse.masked_fill((added == float("-inf")).all(dim=-1), float("-inf"))
        return out.to(dtype), lse

    def differentiate(self, scores: Scores, bucket: QueryBucket, k: Tensor, v: Tensor) -> TileGradients:
        """See :class:`tiles.TileKernel`."""
        kernel = attention_kernels.cpu_kernel()
        assert kernel is not None
        added = scores.added(scores.request.compute_dtype)
        heads = unit_stride(bucket.grad_out.to(bucket.q.dtype), bucket.q, k, v)
        found = kernel.backward(*heads, bucket.out, bucket.lse, 0.0, False, attn_mask=added, scale=scores.request.scale)
        grad_q, grad_k, grad_v = found
        return grad_q, grad_k, grad_v, None


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies where the last dimension is not contiguous: PyTorch's kernels take for granted that it is."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
