"""PyTorch's fused kernels by their own operators, which give the log-sum-exp: kept, it saves a second forward.

``scaled_dot_product_attention`` runs the same operators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import attention_kernels
from ..torch_internals.attention_kernels import Kernel
from .bias import BiasGradient
from .cpu_kernel import unit_stride
from .request import AttentionRequest
from .sdpa import converts_a_mask, fused_kernels, is_causal, not_whole, whole_mask
from .tiles import Saved, Upstream, additive
from .way import Way

ALIGNMENT = 8  # what the CUDA kernels ask of a width, in elements


class WholeKernel(Way):
    """One of PyTorch's kernels for the request as a whole."""

    backend = "fused"
    merit = "PyTorch's fused kernel computes exactly this"
    find: Callable[[], Kernel | None]

    @property
    def kernel(self) -> Kernel:
        """PyTorch's operators."""
        found = type(self).find()
        assert found is not None  # the objection's business
        return found

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        reason = not_whole(request)
        if reason is not None:
            return reason
        if not request.plain:
            return "other kinds of tensors and torch.func's transforms have rules for PyTorch's public functions alone"
        if self.name not in fused_kernels(request, q, k, v):
            return f"the {self.name} kernel does not take {request.dtype} with these arguments on {request.device_type}"
        if request.device_type == "cuda" and request.d % ALIGNMENT:
            return f"a width of {request.d} would have to be padded to a multiple of {ALIGNMENT}"
        return "this PyTorch does not have it" if type(self).find() is None else None

    def drawback(self, request: AttentionRequest) -> str | None:
        return converts_a_mask(request)


class Cpu(WholeKernel):
    """The CPU's kernel."""

    name = "cpu"
    find = staticmethod(attention_kernels.cpu_kernel)

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        options = {"attn_mask": _added(request), "scale": request.scale}
        return tuple(self.kernel.forward(*unit_stride(q, k, v), 0.0, is_causal(request), **options))

    def backward(
        self, request: AttentionRequest, saved: Saved, upstream: Upstream, bias_gradient: BiasGradient
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = unit_stride(upstream.out, saved.q, saved.k, saved.v)
        options = {"attn_mask": _added(request), "scale": request.scale}
        grad_q, grad_k, grad_v = self.kernel.backward(*heads, saved.out, saved.lse, 0.0, is_causal(request), **options)
        return grad_q, grad_k, grad_v


class Flash(WholeKernel):
    """CUDA's flash kernel."""

    name = "flash"
    find = staticmethod(attention_kernels.flash_kernel)

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        heads = unit_stride(q, k, v)
        found = self.kernel.forward(*heads, 0.0, is_causal(request), False, scale=request.scale)
        out, lse, _, _, _, _, seed, offset, _ = found
        return out, lse, seed, offset

    def backward(
        self, request: AttentionRequest, saved: Saved, upstream: Upstream, bias_gradient: BiasGradient
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = unit_stride(upstream.out, saved.q, saved.k, saved.v)
        results = (saved.out, saved.lse, None, None, request.n, request.m, 0.0, is_causal(request), *saved.state)
        grad_q, grad_k, grad_v = self.kernel.backward(*heads, *results, scale=request.scale)
        return grad_q, grad_k, grad_v


class Efficient(WholeKernel):
    """CUDA's memory-efficient kernel."""

    name = "efficient"
    find = staticmethod(attention_kernels.efficient_kernel)

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        options = (_added(request), True, 0.0, is_causal(request))
        return tuple(self.kernel.forward(*unit_stride(q, k, v), *options, scale=request.scale))

    def backward(
        self, request: AttentionRequest, saved: Saved, upstream: Upstream, bias_gradient: BiasGradient
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = unit_stride(upstream.out, saved.q, saved.k, saved.v)
        results = (_added(request), saved.out, saved.lse, *saved.state, 0.0, [True, True, True, False])
        found = self.kernel.backward(*heads, *results, is_causal(request), scale=request.scale)
        grad_q, grad_k, grad_v, _ = found
        return grad_q, grad_k, grad_v


def _added(request: AttentionRequest) -> Tensor | None:
    """Mask and bias as a tensor added to the scores, laid out as the kernels want it."""
    added = whole_mask(request)
    if added is not None and added.dtype == torch.bool:
        added = additive(added, None, request.dtype)
    if added is None or request.device_type == "cpu":
        return added
    padded = F.pad(added.expand(*added.shape[:-1], request.m), (0, -request.m % ALIGNMENT))
    return padded[..., : request.m].to(request.dtype).expand(request.score_shape)
