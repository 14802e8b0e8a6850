"""Apply PyTorch's fused CPU kernel per tile, for masks and windows that it does not support as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dry_run import num_threads
from ..torch_internals import attention_kernels
from .log_sum_exp import LogSumExp, rounded_away
from .negligible import NEGLIGIBLE, largest_products
from .products import Products
from .request import IMMODERATE, AttentionRequest
from .tiles import QueryBucket, Scores, Tiled, TileGradients
from .way import OF_SCORE, BackwardInputs


class CpuKernel(Tiled):
    """Tiles by the fused CPU kernel. It never holds the scores, so without a bias one part covers the whole batch."""

    name = "cpu_kernel"
    merit = "PyTorch's fused kernel computes each tile, in linear memory"

    def elements(self, request: AttentionRequest) -> int:
        # A bias differs by head: it is made for as many as are computed at once, so that it stays in the cache.
        return 2**62 if request.bias is None else request.tile_scores * num_threads()

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if request.device_type != "cpu":
            return f"it is for the CPU, not for {request.device_type}"
        if not request.moderate:
            return IMMODERATE
        if request.dropout:
            return "it has no dropout within a tile"
        if request.bias is not None and request.bias.of_score:
            return OF_SCORE
        if request.d != request.e:
            return f"q and v differ in width ({request.d} and {request.e})"
        return "this PyTorch does not have it" if attention_kernels.cpu_kernel() is None else None

    def add_gradients(
        self, request: AttentionRequest, given: BackwardInputs, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None:
        # The kernel accepts no gradient of the log-sum-exp and returns none of the scores.
        by_products = given.grad_lse is not None or given.bias_gradient.wanted
        add = Products().add_gradients if by_products else super().add_gradients
        add(request, given, grad_q, grad_k, grad_v)

    def bound(self, request: AttentionRequest, q: Tensor, k: Tensor) -> Tensor | None:
        return largest_products(request, q, k)

    def attend(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, LogSumExp] | None:
        kernel = attention_kernels.cpu_kernel()
        assert kernel is not None
        dtype = scores.request.compute_dtype
        visible = scores.visible
        added, level = scores.relative(dtype, visible)
        if level is not None and rounded_away(level) is not None:
            return Products().attend(scores, q, k, v)
        negligible = None if level is None or scores.seen is None else scores.negligible(scores.seen.below(level))
        if negligible is not None and negligible.all():
            return None
        out, lse = kernel.forward(*unit_stride(q, k, v), attn_mask=added, scale=scores.request.scale)
        # The kernel leaves a finite log-sum-exp on a row that sees nothing here.
        if level is not None:
            lse = lse.masked_fill(level.squeeze(-1) == float("-inf"), float("-inf"))
        elif visible is not None:
            lse = lse.masked_fill(~visible.any(dim=-1), float("-inf"))
        if negligible is not None:
            lse = lse.masked_fill(negligible, float("-inf"))
        return out.to(dtype), LogSumExp.of(lse, None if level is None else level.squeeze(-1))

    def differentiate(self, scores: Scores, bucket: QueryBucket, k: Tensor, v: Tensor) -> TileGradients | None:
        kernel = attention_kernels.cpu_kernel()
        assert kernel is not None
        added, level = scores.relative(scores.request.compute_dtype, scores.visible)
        if level is not None and rounded_away(level) is not None:
            return Products().differentiate(scores, bucket, k, v)
        lse = bucket.lse_above(level)
        if added is not None and level is not None and scores.bound is not None:
            # The kernel keeps its scores inside, so weights are hidden that are negligible whatever the scores: those
            # of biases below the floor. (Its forward pass hides denormal ones by itself.)
            floor = (lse - scores.bound).add_(NEGLIGIBLE).unsqueeze(-1)
            falls = floor > 0  # nothing exceeds the level, which is 0 now
            if falls.all():
                return None
            # A bias that falls with distance is least at the ends of a row: others are spared a pass over the tile.
            ends = added[..., :: max(1, added.shape[-1] - 1)]
            falls |= ((ends < floor) & (ends > float("-inf"))).any(dim=-1, keepdim=True)
            if falls.any():
                added = added.masked_fill(added < floor.masked_fill_(~falls, float("-inf")), float("-inf"))
        heads = unit_stride(bucket.grad_out.to(bucket.q.dtype), bucket.q, k, v)
        found = kernel.backward(*heads, bucket.out, lse, 0.0, False, attn_mask=added, scale=scores.request.scale)
        grad_q, grad_k, grad_v = found
        return grad_q, grad_k, grad_v, None


def unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors that PyTorch's kernels do not expect.

    These are strided in the last dimension, have rows or heads that overlap, or, on a GPU, rows that do not begin at
    multiples of 16 bytes.
    """
    return tuple(t if _is_expected(t) else t.contiguous() for t in tensors)


def _is_expected(heads: Tensor) -> bool:
    *strides, last = heads.stride()
    between = [stride for stride, size in zip(strides, heads.shape, strict=False) if size > 1]
    apart = all(stride != 1 for stride in between)
    # In a compiled graph PyTorch's public function lays them out itself.
    aside = heads.device.type == "cpu" or torch.compiler.is_compiling()
    begins = () if aside else (heads.storage_offset(), *between)
    aligned = all(begin * heads.element_size() % 16 == 0 for begin in begins)
    return last == 1 and strides[-1] >= heads.shape[-1] and apart and aligned
