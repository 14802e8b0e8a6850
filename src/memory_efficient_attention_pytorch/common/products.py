"""Matrix products into memory that is there already, by the faster of PyTorch's two CPU libraries.

PyTorch multiplies fp32 matrices with MKL, which uses AVX-512 on Intel's processors only. oneDNN, which PyTorch brings
along for its other products, uses it on any: on an AMD EPYC with AVX-512 it reaches 245 GFLOP/s a thread, MKL 110.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

from .dry_run import each

# oneDNN writes to memory of its own, so a part of the product exists once more: this many elements, which stay in a
# CPU's cache.
PART = 2**18
# It compiles a kernel for each shape, of which some hundred KiB stay. Lengths vary freely, multiples of this less so.
MULTIPLE = 64
# Rows that are few, such as the next token's in a batch.
FEW = 8
# Terms of a sum. With fewer, making that memory costs what the product gains; more are split, again for few shapes.
LEAST_TERMS, MOST_TERMS = 256, 2048
MOST_COLUMNS = PART // MULTIPLE


def linear_into(out: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``out (n, j) = values (n, k) @ weightᵀ (k, j) + bias (j,)``; all of one dtype. Returns out."""
    if not (has_onednn(values, weight) and _worthwhile(values.shape[1], len(weight))):
        return _usual(out, values, weight, bias)
    if len(weight) > MOST_COLUMNS:
        for columns in each(_parts(len(weight), MULTIPLE), first=1):
            linear_into(out[:, columns], values, weight[columns], None if bias is None else bias[columns])
        return out
    weight = _dense(weight)
    for rows in each(_parts(len(values), len(weight)), first=1):
        if len(values[rows]) % MULTIPLE:
            _usual(out[rows], values[rows], weight, bias)
        else:
            out[rows] = _onednn(values[rows], weight, bias)
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total (i, j) += leftᵀ (i, n) @ right (n, j)``; left and right of one dtype, the total of it or a wider one."""
    if has_onednn(left, right) and _worthwhile(len(left), total.shape[1]) and len(left) % MULTIPLE == 0:
        for terms in each(_parts(len(left), PART // MOST_TERMS), first=1):
            part, by = left[terms], _dense(right[terms].t())
            for rows in each(_parts(len(total), total.shape[1]), first=1):
                total[rows] += _onednn(part[:, rows].t(), by)
    elif total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        # A product in low precision cannot add to fp32: it goes through a part, on a CPU a small one.
        size = PART if total.device.type == "cpu" else 2**24
        for rows in each(_parts(len(total), total.shape[1], size), first=1):
            total[rows] += left[:, rows].t() @ right


def product(values: Tensor, weight: Tensor) -> Tensor:
    """``values (n, k) @ weightᵀ`` of a weight ``(j, k)`` without gaps, in either order."""
    if len(weight) % MULTIPLE or weight.shape[1] % MULTIPLE or not has_onednn(values, weight):
        return values @ weight.t()
    return _onednn(values, weight)


class Factor:
    """One matrix of many products, in the order in which oneDNN multiplies by it fastest.

    weight: ``(j, k)`` of any strides and floating-point dtype. length: the one of j and k that varies, of which oneDNN
    is to see multiples of 64 only. rows: how many the other matrices have, most of them. A convolution by a kernel of
    one pixel is oneDNN's only product that adds to memory which is there already.
    """

    def __init__(self, weight: Tensor, *, length: int, rows: int) -> None:
        self.weight, self.packed = weight, None
        if length % MULTIPLE or not onednn_is_usable(weight.device):
            return
        kernel = weight.to(torch.float32)[:, :, None, None]
        if isinstance(weight, FakeTensor):
            self.packed = kernel.clone()
        else:
            shape = [1, weight.shape[1], rows, 1]
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(kernel, *_ONE_TO_ONE, shape)

    def add_product(self, total: Tensor, values: Tensor) -> None:
        """``total (n, j) += values (n, k) @ weightᵀ (k, j)``, both of them contiguous and fp32."""
        if self.packed is None or len(values) % MULTIPLE:
            total.addmm_(values, self.weight.to(values.dtype).t())
            return
        convolve = torch.ops.mkldnn._convolution_pointwise_.binary
        convolve(_as_image(total), _as_image(values), self.packed, None, *_ONE_TO_ONE, "add", 1.0, None, [], None)


_ONE_TO_ONE: Any = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


def _as_image(rows: Tensor) -> Tensor:
    """``(n, c)`` as ``(1, c, n, 1)``, channels last."""
    n, c = rows.shape
    return rows.as_strided((1, c, n, 1), (n * c, 1, c, c))


class Scratch:
    """Buffers by name, made once and used again by every piece of a pass.

    A fresh buffer for each product costs more than a tenth of the product where the allocator gives memory back to the
    system, since every page of it is mapped and cleared anew.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor, in the memory of the last one of this name."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._buffers[name][:size].view(shape)

    def linear(self, name: str, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``values (…, k) @ weightᵀ (k, j) + bias``."""
        rows = values.reshape(-1, values.shape[-1])
        out = self.take(name, len(rows), len(weight))
        return linear_into(out, rows, weight, bias).view(*values.shape[:-1], len(weight))


def _parts(length: int, width: int, size: int = PART) -> Sequence[slice]:
    """Slices of ``length`` rows of ``width``, of ``size`` elements at most but ``MULTIPLE`` rows at least."""
    step = max(MULTIPLE, size // max(width, 1) // MULTIPLE * MULTIPLE)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def few_rows(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``values (n, k) @ weightᵀ + bias`` of one row or few, for which MKL reads a weight at half the memory's speed."""
    return _onednn(values, _dense(weight), bias)


def worthwhile(rows: int, values: Tensor, weight: Tensor) -> bool:
    """Is ``values @ weightᵀ`` by oneDNN the faster one, where the values have so many rows?"""
    if rows < MULTIPLE:
        return rows <= FEW and weight.numel() >= PART and has_onednn(values, weight)
    return _worthwhile(weight.shape[1], len(weight)) and has_onednn(values, weight)


def _usual(out: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(values, weight.t(), out=out)
    return torch.addmm(bias, values, weight.t(), out=out)


def _onednn(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(values, weight, bias, "none", [], "")


def _dense(weight: Tensor) -> Tensor:
    """oneDNN has a fast kernel only for a weight without gaps, in either order."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _worthwhile(terms: int, columns: int) -> bool:
    return terms >= LEAST_TERMS and columns >= MULTIPLE


def has_onednn(*tensors: Tensor) -> bool:
    """Is oneDNN there for products of these, and the faster library?"""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and onednn_is_usable()


def onednn_is_usable(device: torch.device | None = None) -> bool:
    """Is it for fp32 on this device, the CPU?"""
    if torch.compiler.is_compiling():
        return False  # the compiler chooses its own
    on_cpu = device is None or device.type == "cpu"
    return on_cpu and onednn_is_faster() and torch._C._get_mkldnn_enabled()


@cache
def onednn_is_faster() -> bool:
    """Is this a CPU on which MKL leaves AVX-512 unused? Told by what it is, not by a clock: results can be repeated."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 has none
    return bool(capabilities.get("avx512_f")) and "AMD" in capabilities.get("cpu_name", "")


# What PyTorch does not know of these operators, as far as it does not: how much they compute, what the second returns.
if torch.backends.mkldnn.is_available():
    if torch.ops.mkldnn._linear_pointwise not in flop_registry:

        @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
        def _flops(values: tuple[int, int], weight: tuple[int, int], *_: Any, **__: Any) -> int:
            return mm_flop(values, weight[::-1])

    if torch.ops.mkldnn._convolution_pointwise_ not in flop_registry:

        @register_flop_formula(torch.ops.mkldnn._convolution_pointwise_)
        def _flops_in_place(_total: Any, values: tuple[int, ...], kernel: tuple[int, ...], *_: Any, **__: Any) -> int:
            return mm_flop((values[2], values[1]), (kernel[1], kernel[0]))

    if not torch._C._dispatch_has_kernel_for_dispatch_key("mkldnn::_convolution_pointwise_.binary", "Meta"):

        @torch.library.register_fake("mkldnn::_convolution_pointwise_.binary")
        def _fake_in_place(total: Tensor, *_: Any, **__: Any) -> Tensor:
            return total
