"""Count the floating-point operations of one operator from the shapes of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from .accounting import operator_name


def count_flops(operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> int:
    """Count two for each multiply-add of a matrix product, convolution or fused attention; 0 for anything else.

    These are PyTorch's own formulas, extended to fused attention on any device, and to causality: kernels skip what it
    hides.
    """
    kernel = operator_name(operation).removeprefix("aten::_scaled_dot_product_")
    if kernel in _ATTENTION:
        # Matrix products of q's width and of v's width; backward's first argument is the gradient.
        backward = kernel.endswith("_backward")
        of_query, of_value = (3, 2) if backward else (1, 1)
        q, k, v = arguments[backward : backward + 3]
        (b, h, n, d), m = map(int, q.shape), int(k.shape[2])
        causal = len(arguments) > _ATTENTION[kernel] and arguments[_ATTENTION[kernel]]
        square = min(n, m) if causal else 0  # the kernels count from the first query and key
        seen = square * (square + 1) // 2 + (n - square) * m
        return 2 * b * h * seen * (of_query * d + of_value * int(v.shape[3]))
    formula = flop_registry.get(_OUT_OF_PLACE.get(operation.overloadpacket, operation.overloadpacket))
    return 0 if formula is None else int(formula(*arguments, **keywords, out_val=result))


# Where each takes is_causal.
_ATTENTION = {
    **{"flash_attention_for_cpu": 4, "flash_attention": 4, "efficient_attention": 6},
    **{"flash_attention_for_cpu_backward": 7, "flash_attention_backward": 11, "efficient_attention_backward": 11},
}
_OUT_OF_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
