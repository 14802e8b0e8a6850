"""Matrix products into existing memory, by the faster of PyTorch's two CPU libraries.

PyTorch multiplies fp32 matrices with MKL, which uses AVX-512 on Intel's processors only. oneDNN, which PyTorch includes
for other products, uses it on any. Which one is faster on this machine is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from ..torch_internals import onednn
from .dry_run import Alike, device_type, each
from .threads import alone

# oneDNN writes to memory of its own, so a part of the product exists twice: this many elements, which fit in a CPU's
# cache.
PART = 2**18
# It compiles a kernel for each shape and keeps a few hundred KiB of it. There are fewer multiples of this than lengths.
MULTIPLE = 64
# How many times as fast oneDNN must be to be worth it.
LEAST_GAIN = 1.5
# Terms of a sum. With fewer, allocating that memory costs what the product gains; more are split, to have few shapes.
LEAST_TERMS, MOST_TERMS = 256, 2048
MOST_COLUMNS = PART // MULTIPLE


def linear_into(out: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``out (n, j) = values (n, k) @ weightᵀ (k, j) + bias (j,)``; all of one dtype. Returns out."""
    if not (has_onednn(values, weight) and _worthwhile(values.shape[1], len(weight))):
        return _usual(out, values, weight, bias)
    if len(weight) > MOST_COLUMNS:
        for columns in _parts(len(weight), MULTIPLE):
            linear_into(out[:, columns], values, weight[columns], None if bias is None else bias[columns])
        return out
    weight = _dense(weight)
    for rows in _parts(len(values), len(weight), alike=("linear_into", out, values, weight, bias)):
        if len(values[rows]) % MULTIPLE:
            _usual(out[rows], values[rows], weight, bias)
        else:
            out[rows] = _onednn(values[rows], weight, bias)
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``total (i, j) += leftᵀ (i, n) @ right (n, j)``; factors of one dtype, the total of it or a wider one."""
    if has_onednn(left, right) and _worthwhile(len(left), total.shape[1]) and len(left) % MULTIPLE == 0:
        for terms in _parts(len(left), PART // MOST_TERMS, alike=("add_product", total, left, right)):
            part, by = left[terms], _dense(right[terms].t())
            for rows in _parts(len(total), total.shape[1]):
                total[rows] += _onednn(part[:, rows].t(), by)
    elif total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        # A product in low precision cannot add to fp32, so it is computed in parts, small ones on a CPU.
        size = PART if device_type(total.device) == "cpu" else 2**24
        for rows in _parts(len(total), total.shape[1], size, alike=("add_product", total, left, right)):
            total[rows] += left[:, rows].t() @ right


def product(values: Tensor, weight: Tensor) -> Tensor:
    """Return ``values (n, k) @ weightᵀ`` of a dense weight ``(j, k)``, in row- or column-major order."""
    if len(weight) % MULTIPLE or weight.shape[1] % MULTIPLE or not has_onednn(values, weight):
        return values @ weight.t()
    return _onednn(values, weight)


class PackedWeight:
    """Packs a matrix used in many products in the layout in which oneDNN multiplies by it fastest.

    weight: ``(j, k)`` of any strides and floating-point dtype. length: whichever of j and k varies; oneDNN
    is used for multiples of 64 only. rows: the number that most of the other matrices have.
    """

    def __init__(self, weight: Tensor, *, length: int, rows: int) -> None:
        self.weight = weight
        self._onednn = onednn.in_place_product() if length % MULTIPLE == 0 and onednn_is_usable(weight.device) else None
        if self._onednn is not None:
            self._packed = self._onednn.pack(weight.to(torch.float32), rows)

    def add_product(self, total: Tensor, values: Tensor) -> None:
        """Compute ``total (n, j) += values (n, k) @ weightᵀ (k, j)``, both contiguous and fp32."""
        if self._onednn is None or len(values) % MULTIPLE:
            total.addmm_(values, self.weight.to(values.dtype).t())
        else:
            self._onednn.add(total, values, self._packed)


class Scratch:
    """Named buffers, allocated once and reused by every piece of a pass.

    A fresh buffer for each product costs more than a tenth of the product where the allocator returns memory to the
    system, since every page is mapped and cleared again.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor that reuses the memory of the last one of this name."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._buffers[name][:size].view(shape)

    def linear(self, name: str, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``values (…, k) @ weightᵀ (k, j) + bias (j,)`` in the buffer of this name."""
        rows = values.reshape(-1, values.shape[-1])
        out = self.take(name, len(rows), len(weight))
        return linear_into(out, rows, weight, bias).view(*values.shape[:-1], len(weight))


def _parts(length: int, width: int, size: int = PART, alike: Alike = None) -> Iterable[slice]:
    """Cut ``length`` rows of ``width`` into slices of at most ``size`` elements, but at least ``MULTIPLE`` rows."""
    step = max(MULTIPLE, size // max(width, 1) // MULTIPLE * MULTIPLE)
    # A product's first part allocates nothing that the others would reuse.
    return each([slice(start, min(start + step, length)) for start in range(0, length, step)], first=1, alike=alike)


def _usual(out: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(values, weight.t(), out=out)
    return torch.addmm(bias, values, weight.t(), out=out)


def _onednn(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    linear = onednn.linear()
    assert linear is not None  # has_onednn
    return linear(values, weight, bias)


def _dense(weight: Tensor) -> Tensor:
    """Make a weight dense, row- or column-major: oneDNN has fast kernels only for those."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _worthwhile(terms: int, columns: int) -> bool:
    return terms >= LEAST_TERMS and columns >= MULTIPLE


def has_onednn(*tensors: Tensor) -> bool:
    """Return True if oneDNN can multiply these tensors and is the faster library."""
    usable = all(t.dtype == torch.float32 and onednn_is_usable(t.device) for t in tensors)
    return usable and onednn_is_faster() and onednn.linear() is not None


def onednn_is_usable(device: torch.device) -> bool:
    """Return True if oneDNN can multiply fp32 here: on a CPU, outside a compiler, which has its own products."""
    if torch.compiler.is_compiling() or device_type(device) != "cpu":
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


@cache
def onednn_is_faster() -> bool:
    """Return True if oneDNN multiplies fp32 faster than PyTorch's usual library by enough to make up for its overhead.

    Measured once per process, in 20 to 80 ms, on one core: the best of ten products by each, in turn. On an AMD EPYC of
    family 25, which executes AVX-512 in halves, the rates differ by a factor of 1.17, on one of family 26 by 2.2.
    """
    if not torch.backends.mkldnn.is_available() or onednn.linear() is None:
        return False
    usual, by_onednn = alone(_seconds_of_products)
    return usual >= LEAST_GAIN * by_onednn > 0


def _seconds_of_products() -> tuple[float, float]:
    """Return the least processor time of a product of 512 × 512 matrices, by PyTorch's usual library and by oneDNN.

    It is the time of this thread alone: beside other work, elapsed times differ by any factor.
    """
    values, weight = (torch.ones(512, 512, device="cpu") for _ in range(2))
    ways: tuple[Callable[[], Tensor], ...] = (lambda: values @ weight.t(), lambda: _onednn(values, weight))
    least = [math.inf, math.inf]
    for _ in range(10):
        for i, multiply in enumerate(ways):
            start = time.thread_time()
            multiply()
            least[i] = min(least[i], time.thread_time() - start)
    return least[0], least[1]
