"""Apply CUDA's memory-efficient kernel per tile, for what PyTorch's function would need an n × m mask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import attention_kernels
from ..torch_internals.attention_kernels import Kernel
from ..torch_internals.tensors import are_plain, is_fake
from .cpu_kernel import unit_stride
from .log_sum_exp import LogSumExp
from .products import Products
from .request import AttentionRequest
from .tiles import Found, Part, QueryBucket, Scores, Tiled, TileGradients
from .way import OF_SCORE, BackwardInputs
from .whole_kernels import ALIGNMENT, laid_out, token_major

# Least sides of a tile: each tile is a launch, which must fill the device.
QUERIES, KEYS = 2048, 4096
LSE_MULTIPLE = 32  # the kernel pads the log-sum-exp to a multiple of this many queries


class CudaKernel(Tiled):
    """Computes tiles by CUDA's memory-efficient kernel.

    It never holds the scores. It does not support grouped queries, so a tile's keys and values are repeated. Its
    dropout draws its own random numbers, so dropout is left to plain products."""

    name = "cuda_kernel"
    merit = "PyTorch's memory-efficient kernel computes each tile, in linear memory"

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if request.device_type != "cuda":
            return f"it is for CUDA, not for {request.device_type}"
        if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"the kernel does not take {request.dtype}"
        if request.dropout:
            return "the kernel drops other weights than the tiles do"
        if request.bias is not None and request.bias.of_score:
            return OF_SCORE
        if request.d != request.e or request.d % ALIGNMENT:
            return f"q and v must have one width, a multiple of {ALIGNMENT}, not {request.d} and {request.e}"
        if not are_plain(q, k, v):
            return "tensor subclasses and torch.func's transforms support only PyTorch's public functions"
        if request.dtype == torch.bfloat16 and not _has_bfloat16(q):
            return "this GPU's kernels do not take bfloat16"
        return "this PyTorch does not have it" if attention_kernels.efficient_kernel() is None else None

    def rows(
        self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, before: Found | None = None
    ) -> Iterator[tuple[Part, slice, Tensor, LogSumExp]]:
        return super().rows(_in_large_tiles(request), q, k, v, before)

    def add_gradients(
        self, request: AttentionRequest, given: BackwardInputs, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> None:
        if given.grad_lse is not None:  # the kernel does not accept it
            return Products().add_gradients(request, given, grad_q, grad_k, grad_v)
        return super().add_gradients(_in_large_tiles(request), given, grad_q, grad_k, grad_v)

    def attend(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, LogSumExp]:
        added, level = scores.relative(torch.float32, scores.visible)
        heads = unit_stride(q, *_for_each_query_head(q, k, v))
        bias = _bias(added, q, k)
        out, lse, *_ = _kernel().forward(*heads, bias, True, 0.0, False, scale=scores.request.scale)
        out, lse = out.to(torch.float32), lse[:, :, : q.shape[2]]
        if added is not None:
            # For a row that sees nothing here the kernel's results are undefined.
            nothing = (added == float("-inf")).all(dim=-1)
            out = out.masked_fill(nothing.unsqueeze(-1), 0.0)
            lse = lse.masked_fill(nothing, float("-inf"))
        return out, LogSumExp.of(lse, None if level is None else level.squeeze(-1))

    def differentiate(self, scores: Scores, bucket: QueryBucket, k: Tensor, v: Tensor) -> TileGradients:
        added, level = scores.relative(torch.float32, scores.visible)
        q, i = bucket.q, bucket.q.shape[2]
        lse = F.pad(bucket.lse_above(level), (0, -i % LSE_MULTIPLE), value=float("inf"))
        heads = unit_stride(bucket.grad_out.to(q.dtype), q, *_for_each_query_head(q, k, v))
        bias = _bias(added, q, k)
        # Random state, unused without dropout.
        seed = offset = torch.zeros((), dtype=torch.int64, device=q.device)
        wanted = bucket.bias_gradient.wanted
        options = (0.0, [True, True, True, wanted], False)
        results = (bias, token_major(bucket.out.to(q.dtype)), lse, seed, offset)
        found = _kernel().backward(*heads, *results, *options, scale=scores.request.scale)
        grad_q, grad_k, grad_v, grad_scores = found
        kv = k.shape[1]
        of_keys = (x.unflatten(1, (kv, -1)).sum(2, dtype=torch.float32) for x in (grad_k, grad_v))
        return grad_q, *of_keys, grad_scores if wanted else None


def _has_bfloat16(q: Tensor) -> bool:
    """Return whether kernels for q's GPU take bfloat16: from compute capability 8.0 on; True where no GPU is asked."""
    asked = q.is_cuda and not is_fake(q) and torch.cuda.is_available()
    return not asked or torch.cuda.get_device_capability(q.device) >= (8, 0)


def _kernel() -> Kernel:
    found = attention_kernels.efficient_kernel()
    assert found is not None  # else objection() refuses
    return found


def _bias(added: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if added is None else laid_out(added, q.dtype, (*q.shape[:3], k.shape[2]))


def _in_large_tiles(request: AttentionRequest) -> AttentionRequest:
    sides = {"q_bucket_size": QUERIES, "k_bucket_size": KEYS}
    return replace(request, **{name: max(size, getattr(request, name)) for name, size in sides.items()})


def _for_each_query_head(q: Tensor, *of_keys: Tensor) -> tuple[Tensor, ...]:
    group = q.shape[1] // of_keys[0].shape[1]
    return of_keys if group == 1 else tuple(x.repeat_interleave(group, dim=1) for x in of_keys)
