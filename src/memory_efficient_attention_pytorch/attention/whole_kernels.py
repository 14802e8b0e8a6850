"""Call PyTorch's fused kernels by operators that return the log-sum-exp; keeping it saves a second forward.

``scaled_dot_product_attention`` runs the same operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import attention_kernels
from ..torch_internals.attention_kernels import Kernel
from ..torch_internals.tensors import are_plain
from .cpu_kernel import unit_stride
from .request import AttentionRequest
from .sdpa import Fused, fused_kernels, not_whole, whole_mask
from .tiles import additive
from .way import BackwardInputs

ALIGNMENT = 8  # the CUDA kernels need widths that are multiples of this


class WholeKernel(Fused):
    """Calls a kernel by its own operators; ``find`` returns them, or None if this PyTorch lacks them."""

    find: Callable[[], Kernel | None]

    @property
    def kernel(self) -> Kernel:
        """PyTorch's operators."""
        found = type(self).find()
        assert found is not None  # else objection() refuses
        return found

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        reason = not_whole(request)
        if reason is not None:
            return reason
        if not are_plain(q, k, v):
            return "tensor subclasses and torch.func's transforms support only PyTorch's public functions"
        if self.name not in fused_kernels(request, q, k, v):
            return f"the {self.name} kernel does not take {request.dtype} with these arguments on {request.device_type}"
        if request.device_type == "cuda" and request.d % ALIGNMENT:
            return f"a width of {request.d} would have to be padded to a multiple of {ALIGNMENT}"
        return "this PyTorch does not have it" if type(self).find() is None else None


class Cpu(WholeKernel):
    """The CPU's kernel."""

    name = "cpu"
    find = staticmethod(attention_kernels.cpu_kernel)

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        options = {"attn_mask": _added(request), "scale": request.scale}
        return self.kernel.forward(*unit_stride(q, k, v), 0.0, request.visibility.plain_causal, **options)

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        heads = unit_stride(given.grad_out, given.q, given.k, given.v)
        options = {"attn_mask": _added(request), "scale": request.scale}
        return self.kernel.backward(*heads, given.out, given.lse, 0.0, request.visibility.plain_causal, **options)


class Flash(WholeKernel):
    """CUDA's flash kernel."""

    name = "flash"
    find = staticmethod(attention_kernels.flash_kernel)

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        options = (0.0, request.visibility.plain_causal, False)
        out, lse, _, _, _, _, *state, _ = self.kernel.forward(*unit_stride(q, k, v), *options, scale=request.scale)
        return out, lse, *state

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        heads = unit_stride(given.grad_out, given.q, given.k, given.v)
        options = (None, None, request.n, request.m, 0.0, request.visibility.plain_causal, *given.state)
        return self.kernel.backward(*heads, given.out, given.lse, *options, scale=request.scale)


class Efficient(WholeKernel):
    """CUDA's memory-efficient kernel."""

    name = "efficient"
    find = staticmethod(attention_kernels.efficient_kernel)

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        reason = super().objection(request, q, k, v)
        # PyTorch's function may take shared heads by repeating them before it calls the kernel.
        return "it needs as many key as query heads" if reason is None and request.h != request.kv else reason

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        options = (_added(request), True, 0.0, request.visibility.plain_causal)
        return self.kernel.forward(*unit_stride(q, k, v), *options, scale=request.scale)

    def backward(self, request: AttentionRequest, given: BackwardInputs) -> tuple[Tensor, ...]:
        heads = unit_stride(given.grad_out, given.q, given.k, given.v)
        results = (_added(request), token_major(given.out), given.lse, *given.state)
        options = (0.0, [True, True, True, False], request.visibility.plain_causal)
        return self.kernel.backward(*heads, *results, *options, scale=request.scale)[:3]


def _added(request: AttentionRequest) -> Tensor | None:
    """Return mask and bias as one additive tensor in the layout that the kernels require."""
    added = whole_mask(request)
    if added is not None and added.dtype == torch.bool:
        added = additive(added, None, request.dtype)
    if added is None or request.device_type == "cpu":
        return added
    return laid_out(added, request.dtype, request.score_shape)


def token_major(out: Tensor) -> Tensor:
    """Return ``out (b, h, n, e)`` with a token's heads beside one another and nothing between two tokens.

    The backward kernel of CUDA's memory-efficient attention reads it so, whatever its strides.
    """
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def laid_out(added: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return an additive mask as CUDA's kernel requires it: q's dtype, the scores' shape, several rows aligned."""
    keys = shape[-1]
    rows = F.pad(added.to(dtype).expand(*added.shape[:-1], keys), (0, -keys % ALIGNMENT)).contiguous()
    return rows[..., :keys].expand(*shape)
