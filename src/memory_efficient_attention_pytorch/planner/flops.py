"""Floating-point operations of one operator, by the shapes it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def count_flops(operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> int:
    """Two for each multiply-add of a matrix product, convolution or fused attention; 0 for anything else.

    PyTorch's own counting, extended by the CPU's fused attention. Causality is not deducted, as is usual there.
    """
    packet = operation._overloadpacket
    if packet in _ATTENTION_PRODUCTS:
        of_query, of_value, first = _ATTENTION_PRODUCTS[packet]
        q, k, v = arguments[first : first + 3]
        return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (of_query * q.shape[3] + of_value * v.shape[3])
    formula = flop_registry.get(_OUT_OF_PLACE.get(packet, packet))
    return 0 if formula is None else formula(*arguments, **keywords, out_val=result)


_OUT_OF_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}

# Matrix products with the width of q, with that of v, and where q stands among the arguments.
_ATTENTION_PRODUCTS = {
    aten._scaled_dot_product_flash_attention_for_cpu: (1, 1, 0),
    aten._scaled_dot_product_flash_attention: (1, 1, 0),
    aten._scaled_dot_product_efficient_attention: (1, 1, 0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (3, 2, 1),
    aten._scaled_dot_product_flash_attention_backward: (3, 2, 1),
    aten._scaled_dot_product_efficient_attention_backward: (3, 2, 1),
}
