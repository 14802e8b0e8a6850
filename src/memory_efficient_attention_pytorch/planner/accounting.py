"""What a device's allocator and kernels take beyond the tensors themselves: the calibrated part of a plan.

The figures for the CPU were measured operator by operator with ``benchmarks/planner_accuracy.py --operators``. Those
for CUDA are what the kernels and the allocator of PyTorch 2.13 ask for by their source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
KIB, MIB = 2**10, 2**20
PAGE = 4 * KIB


@dataclass(frozen=True)
class Accounting:
    """Turns tensors' bytes into a device's bytes. ``threads``: those of the CPU's kernels."""

    device: torch.device
    threads: int = 1

    def rounding(self, nbytes: int) -> int:
        """Bytes the device's allocator adds to an allocation of ``nbytes``."""
        return 0

    def workspace(self, operation: Any, arguments: tuple[Any, ...]) -> int:
        """Bytes that libraries hold while an operation runs, and that its kernel allocates for itself."""
        return 0


def accounting_for(device: torch.device, threads: int | None = None) -> Accounting:
    """The accounting of a device; ``threads`` of the CPU's kernels, PyTorch's own number if None."""
    kinds = {"cpu": CpuAccounting, "cuda": CudaAccounting}
    return kinds.get(device.type, Accounting)(device, threads or torch.get_num_threads())


class CpuAccounting(Accounting):
    """Pages of the process, and the buffers that kernels keep per thread."""

    def rounding(self, nbytes: int) -> int:
        # Header and alignment; from 64 KiB on a block has pages of its own.
        return -nbytes % PAGE + PAGE if nbytes >= 64 * KIB else 64

    def workspace(self, operation: Any, arguments: tuple[Any, ...]) -> int:
        packet = operation._overloadpacket
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:
            return _CPU_RESIDENT + self.threads * 512 * KIB
        if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            return _CPU_RESIDENT + self.threads * MIB + _copy_unless_token_major(arguments[1])
        if packet is aten.logsumexp:
            return _CPU_RESIDENT + _nbytes(arguments[0])
        return _CPU_RESIDENT


# What matrix products and the C library's heap keep once they have run.
_CPU_RESIDENT = 3 * MIB


def _copy_unless_token_major(query: Tensor) -> int:
    """The CPU's kernel copies ``(b, h, n, d)`` that does not lie in memory as ``(b, n, h, d)``."""
    _, of_head, of_token, _ = query.stride()
    return 0 if of_token >= of_head else _nbytes(query)


class CudaAccounting(Accounting):
    """The caching allocator's blocks, and what attention's backward pass and matrix products allocate."""

    def rounding(self, nbytes: int) -> int:
        return -nbytes % 512

    def workspace(self, operation: Any, arguments: tuple[Any, ...]) -> int:
        packet = operation._overloadpacket
        if packet in _ATTENTION_BACKWARD:
            b, h, n, d = arguments[1].shape
            rows = b * h * math.ceil(n / 128) * 128
            # The gradient of the queries is summed in fp32, beside one number for each row.
            return _CUBLAS + 4 * rows * (math.ceil(d / 32) * 32 + 1)
        return _CUBLAS


_ATTENTION_BACKWARD = {
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
}
_CUBLAS = 32 * MIB  # the workspace that PyTorch gives cuBLAS on current devices


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
