"""Matrix products into memory that is there already, by the faster of PyTorch's two CPU libraries.

PyTorch multiplies fp32 matrices with MKL, which uses AVX-512 on Intel's processors only. oneDNN, which PyTorch brings
along for its other products, uses it on any: on an AMD EPYC with AVX-512 it reaches 245 GFLOP/s a thread, MKL 110.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

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
    if not (_has_onednn(values, weight) and _worthwhile(values.shape[1], len(weight))):
        return _usual(out, values, weight, bias)
    if len(weight) > MOST_COLUMNS:
        for columns in _parts(len(weight), MULTIPLE):
            linear_into(out[:, columns], values, weight[columns], None if bias is None else bias[columns])
        return out
    weight = _dense(weight)
    for rows in _parts(len(values), len(weight)):
        if len(values[rows]) % MULTIPLE:
            _usual(out[rows], values[rows], weight, bias)
        else:
            out[rows] = _onednn(values[rows], weight, bias)
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total (i, j) += leftᵀ (i, n) @ right (n, j)``; left and right of one dtype, the total of it or a wider one."""
    if _has_onednn(left, right) and _worthwhile(len(left), total.shape[1]) and len(left) % MULTIPLE == 0:
        for terms in _parts(len(left), PART // MOST_TERMS):
            part, by = left[terms], _dense(right[terms].t())
            for rows in _parts(len(total), total.shape[1]):
                total[rows] += _onednn(part[:, rows].t(), by)
    elif total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        # A product in low precision cannot add to fp32: it goes through a part, on a CPU a small one.
        size = PART if total.device.type == "cpu" else 2**24
        for rows in _parts(len(total), total.shape[1], size):
            total[rows] += left[:, rows].t() @ right


def _parts(length: int, width: int, size: int = PART) -> Iterator[slice]:
    """Slices of ``length`` rows of ``width``, of ``size`` elements at most but ``MULTIPLE`` rows at least."""
    step = max(MULTIPLE, size // max(width, 1) // MULTIPLE * MULTIPLE)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def few_rows(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``values (n, k) @ weightᵀ + bias`` of one row or few, for which MKL reads a weight at half the memory's speed."""
    return _onednn(values, _dense(weight), bias)


def worthwhile(rows: int, values: Tensor, weight: Tensor) -> bool:
    """Is ``values @ weightᵀ`` by oneDNN the faster one, where the values have so many rows?"""
    if rows < MULTIPLE:
        return rows <= FEW and weight.numel() >= PART and _has_onednn(values, weight)
    return _worthwhile(weight.shape[1], len(weight)) and _has_onednn(values, weight)


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


def _has_onednn(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # the compiler chooses its own
    if not all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors):
        return False
    return onednn_is_faster() and torch._C._get_mkldnn_enabled()


@cache
def onednn_is_faster() -> bool:
    """Is this a CPU on which MKL leaves AVX-512 unused? Told by what it is, not by a clock: results can be repeated."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 has none
    return bool(capabilities.get("avx512_f")) and "AMD" in capabilities.get("cpu_name", "")


if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(values: tuple[int, int], weight: tuple[int, int], *_: Any, **__: Any) -> int:
        """For PyTorch's counter of operations, which does not know this product."""
        return mm_flop(values, weight[::-1])
