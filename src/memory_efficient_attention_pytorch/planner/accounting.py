"""Memory that a device's allocator and kernels take beyond the tensors themselves: the calibrated part of a plan.

The figures for the CPU were measured operator by operator with ``benchmarks/planner_accuracy.py --operators``. Those
for CUDA were read from the source of PyTorch 2.13's kernels and allocator.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.errors import require_positive_int
from ..torch_internals.trees import tree_leaves

KIB, MIB = 2**10, 2**20
PAGE = 4 * KIB


class Loop(NamedTuple):
    """A recorded loop: names of its operations, rows of live bytes less the bytes live at its start, and its FLOPs.

    kept: (first row, key, bytes) of each buffer that libraries keep for good, which the rows do not include.
    """

    names: list[str]
    rows: NDArray[np.int64]
    flops: float
    kept: list[tuple[int, object, int]]


@dataclass
class Accounting:
    """Turns tensors' bytes into a device's bytes, over one run. ``threads``: those of the CPU's kernels.

    loops: loops recorded in any run. kept: bytes that libraries keep for good after the operations so far, in order.
    """

    device: torch.device
    threads: int = 1
    loops: dict[object, Loop] = field(default_factory=dict)
    kept: dict[object, int] = field(default_factory=dict, init=False)

    def anew(self) -> Accounting:
        """Return a copy for another run: with the recorded loops, without what libraries keep."""
        return replace(self)

    def rounding(self, nbytes: int) -> int:
        """Return the bytes that the device's allocator adds to an allocation of ``nbytes``."""
        return 0

    def workspace(self, operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int:
        """Return the bytes that an operation's kernel allocates for itself while it runs."""
        return 0

    def in_transit(self, collective: str, arguments: tuple[Any, ...]) -> int:
        """Return the bytes that a collective of torch.distributed allocates for itself while it runs."""
        return 0


def accounting_for(device: torch.device, threads: int | None = None) -> Accounting:
    """Return the accounting of a device; ``threads``: those of the CPU's kernels, PyTorch's own number if None."""
    threads = torch.get_num_threads() if threads is None else threads
    require_positive_int("threads", threads)
    kinds = {"cpu": CpuAccounting, "cuda": CudaAccounting}
    return kinds.get(device.type, Accounting)(device, threads)


@dataclass
class CpuAccounting(Accounting):
    """Whole pages, the kernels' buffers, the copies that some kernels make, and compiled kernels that are kept."""

    def __post_init__(self) -> None:
        self.kept["matrix products and heap"] = _RESIDENT

    def rounding(self, nbytes: int) -> int:
        # Header and alignment; a block of at least 64 KiB has pages of its own.
        return -nbytes % PAGE + PAGE if nbytes >= 64 * KIB else 64

    def workspace(self, operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int:
        name, tensors = operator_name(operation), [x for x in arguments if isinstance(x, Tensor)]
        half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors)
        if half and name in _KEPT and torch.backends.cpu.get_cpu_capability() != "AVX2":
            layout = tuple((tensor.shape, tensor.is_contiguous()) for tensor in tensors)
            self.kept[name, layout] = _KEPT[name]
            if name == _CPU_ATTENTION + "_backward" and has_amx() and _is_ragged(tensors[2].shape[-2]):
                self.kept[name, "ragged"] = _RAGGED + (self.threads - 1) * _RAGGED_PER_THREAD
        if name in _KEPT_IN_SINGLE:
            self.kept[name, tuple(tensor.shape for tensor in tensors)] = _KEPT_IN_SINGLE[name]
        if name == _TILE_PRODUCT:
            self.kept[name] = _TILE_BUFFERS * self.threads
        taken = self.threads * _BUFFERS[name][half] if name in _BUFFERS else 0
        if name == _CPU_ATTENTION and half and has_amx():
            taken += tensors[1].nbytes + tensors[2].nbytes  # packed anew
        elif name == _CPU_ATTENTION + "_backward":
            taken += 0 if tensors[0].transpose(1, 2).is_contiguous() else tensors[0].nbytes
        elif name == _PRODUCT:
            taken += 0 if tensors[0].is_contiguous() else tensors[0].nbytes
        elif name == "aten::convolution_backward":
            taken += tensors[0].nbytes + tensors[1].nbytes  # in oneDNN's layout
        elif name in _FUSED_ATTENTION:
            x, heads = tensors[0], arguments[_FUSED_ATTENTION[name]]
            batch, tokens, _ = x.shape
            attention = 3 * x.nbytes + batch * heads * tokens**2 * x.element_size()  # q, k, v and all scores
            wide = arguments[_FIRST_OF_FEED_FORWARD].shape[0] if name == _ENCODER_LAYER else 0
            taken += max(attention, x.nbytes + batch * tokens * wide * x.element_size())
        elif name == "aten::logsumexp":
            taken += tensors[0].nbytes
        elif name in ("aten::sum", "aten::mean") and keywords.get("dtype") not in (None, tensors[0].dtype):
            taken += tensors[0].numel() * keywords["dtype"].itemsize
        elif torch.Tag.pointwise in operation.tags and name != "aten::copy_":
            taken += _converted(tensors)
        return taken

    def in_transit(self, collective: str, arguments: tuple[Any, ...]) -> int:
        """Return the bytes Gloo allocates: it gathers into one tensor and sums what it scatters in a copy."""
        return sum(tensor.nbytes for tensor in tree_leaves(arguments[0])) if collective in _COPIED else 0


@functools.cache
def operator_name(operation: Any) -> str:
    """Return the name without the overload: ``"aten::add"``."""
    return str(operation.name()).partition(".")[0]


@functools.cache
def has_amx() -> bool:
    """Whether the processor multiplies half-precision matrices in tile registers, which PyTorch 2.11 does not tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


_COPIED = ("all_gather", "reduce_scatter")
_CPU_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
# Of PyTorch's own layers in eval mode without gradients, by the place of their argument for the number of heads.
_ENCODER_LAYER, _FIRST_OF_FEED_FORWARD = "aten::_transformer_encoder_layer_fwd", 14
_FUSED_ATTENTION = {_ENCODER_LAYER: 2, "aten::_native_multi_head_attention": 4}
# oneDNN's operators, which not every build has.
_PRODUCT, _TILE_PRODUCT = "mkldnn::_linear_pointwise", "mkldnn::_convolution_pointwise_"
# Kept by matrix products and the C library's heap after first use.
_RESIDENT = 2 * MIB
# Kept by oneDNN for each shape and layout that it has compiled a kernel for in half precision. x86 processors without
# AVX-512 compute half precision by PyTorch's own loops instead.
_KEPT = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"), 540 * KIB),
    _CPU_ATTENTION: 1750 * KIB,
    _CPU_ATTENTION + "_backward": 2150 * KIB,
}
# With AMX, what attention's backward keeps besides, by thread, of lengths that are no multiple of its blocks.
_BLOCK, _RAGGED, _RAGGED_PER_THREAD = 512, 8 * MIB, 4 * MIB
# The same of each shape in single precision.
_KEPT_IN_SINGLE = {_PRODUCT: 590 * KIB, _TILE_PRODUCT: 170 * KIB}
# Kept per thread by oneDNN's products of attention tiles.
_TILE_BUFFERS = 1500 * KIB
# Buffers per thread, in single and in half precision.
_BUFFERS = {
    _CPU_ATTENTION: (500 * KIB, 700 * KIB),
    _CPU_ATTENTION + "_backward": (950 * KIB, 1600 * KIB),
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::addmm_"), (0, 1250 * KIB)),
}


def _is_ragged(length: int) -> bool:
    return length > _BLOCK and length % _BLOCK > 0


def _converted(tensors: list[Tensor]) -> int:
    """Return the bytes of converted copies: element-wise CPU kernels first copy operands to a common dtype."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim()]
    if not floating:
        return 0
    common = functools.reduce(torch.promote_types, (tensor.dtype for tensor in floating))
    return sum(tensor.numel() * common.itemsize for tensor in floating if tensor.dtype != common)


@dataclass
class CudaAccounting(Accounting):
    """The caching allocator's blocks, and what attention's backward pass and matrix products allocate."""

    def rounding(self, nbytes: int) -> int:
        return -nbytes % 512

    def __post_init__(self) -> None:
        self.kept["cuBLAS"] = _CUBLAS

    def workspace(self, operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int:
        if operator_name(operation) in _ATTENTION_BACKWARD:
            b, h, n, d = map(int, arguments[1].shape)
            rows = b * h * math.ceil(n / 128) * 128
            # The gradient of the queries is summed in fp32, with one more number for each row.
            return 4 * rows * (math.ceil(d / 32) * 32 + 1)
        return 0


_ATTENTION_BACKWARD = (
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
)
_CUBLAS = 32 * MIB  # the workspace that PyTorch gives cuBLAS on current devices
