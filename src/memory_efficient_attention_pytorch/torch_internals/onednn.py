"""oneDNN's products on the CPU, through operators that PyTorch made for its compiler and for convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

from .capabilities import capability, operator
from .tensors import is_fake

_ONE_TO_ONE: Any = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


@capability
def linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """``linear(values (n, k), weight (j, k), bias (j,) or None) -> (n, j)``, by oneDNN."""
    found = operator("mkldnn::_linear_pointwise", ("X", "W", "B", "attr", "scalars", "algorithm"))
    if found is None:
        return None
    _teach_flops(torch.ops.mkldnn._linear_pointwise, lambda values, weight, *_, **__: mm_flop(values, weight[::-1]))
    return lambda values, weight, bias: found(values, weight, bias, "none", [], "")


class InPlaceProduct(NamedTuple):
    """``pack(weight (j, k), rows)`` and then ``add(total (n, j), values (n, k), packed)``: ``total += values weightᵀ``.

    All contiguous and fp32; n and the length of the packed weight that varies are to be multiples of 64. ``rows``: the
    usual n. The only oneDNN product that adds to existing memory is a convolution with a kernel of one
    pixel, with images of ``(1, channels, n, 1)``, channels last.
    """

    pack: Callable[[Tensor, int], Tensor]
    add: Callable[[Tensor, Tensor, Tensor], None]


@capability
def in_place_product() -> InPlaceProduct | None:
    """See :class:`InPlaceProduct`."""
    arguments = ("other", "X", "W", "B", "padding", "stride", "dilation", "groups", "binary_attr", "alpha")
    convolve = operator("mkldnn::_convolution_pointwise_.binary", arguments)
    reorder = operator(
        "mkldnn::_reorder_convolution_weight", ("self", "padding", "stride", "dilation", "groups", "input_size")
    )
    if convolve is None or reorder is None:
        return None
    _teach_shapes_and_flops()

    def pack(weight: Tensor, rows: int) -> Tensor:
        kernel = weight[:, :, None, None]
        return kernel.clone() if is_fake(weight) else reorder(kernel, *_ONE_TO_ONE, [1, weight.shape[1], rows, 1])

    def add(total: Tensor, values: Tensor, packed: Tensor) -> None:
        convolve(_as_image(total), _as_image(values), packed, None, *_ONE_TO_ONE, "add", 1.0, None, [], None)

    return InPlaceProduct(pack, add)


def _as_image(rows: Tensor) -> Tensor:
    """``(n, c)`` as ``(1, c, n, 1)``, channels last."""
    n, c = rows.shape
    return rows.as_strided((1, c, n, 1), (n * c, 1, c, c))


def _teach_shapes_and_flops() -> None:
    """Register what PyTorch does not know of the operator: its FLOPs, and its result for fake tensors."""

    def flops(_total: Any, values: tuple[int, ...], kernel: tuple[int, ...], *_: Any, **__: Any) -> int:
        return mm_flop((values[2], values[1]), (kernel[1], kernel[0]))

    _teach_flops(torch.ops.mkldnn._convolution_pointwise_, flops)
    name = "mkldnn::_convolution_pointwise_.binary"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
        torch.library.register_fake(name, lambda total, *_, **__: total)


def _teach_flops(packet: Any, formula: Callable[..., int]) -> None:
    if packet not in flop_registry:
        register_flop_formula(packet)(formula)
