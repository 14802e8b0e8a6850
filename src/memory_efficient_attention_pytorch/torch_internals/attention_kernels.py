"""The operators behind ``scaled_dot_product_attention``, which give the log-sum-exp, and those of its backward.

``(b, h, n, d)`` as there; the last dimension contiguous. A backward is exact for a part of the keys too, given the
output and the log-sum-exp of whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .capabilities import capability, operator

_NAME = "aten::_scaled_dot_product_"


class Kernel(NamedTuple):
    """``forward`` and ``backward`` are PyTorch's operators of these names, with their arguments."""

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Any, ...]]


def _kernel(name: str, forward: str, backward: str) -> Kernel | None:
    """The kernel of this name, if its two operators have these arguments."""
    there, back = operator(_NAME + name, forward.split()), operator(f"{_NAME}{name}_backward", backward.split())
    return None if there is None or back is None else Kernel(there, back)


@capability
def cpu_kernel() -> Kernel | None:
    """The CPU's kernel: an additive mask, no dropout to speak of."""
    return _kernel(
        "flash_attention_for_cpu",
        "query key value dropout_p is_causal attn_mask scale",
        "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",
    )


@capability
def flash_kernel() -> Kernel | None:
    """CUDA's flash kernel: half precision, no mask."""
    return _kernel(
        "flash_attention",
        "query key value dropout_p is_causal return_debug_mask scale",
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k "
        "dropout_p is_causal philox_seed philox_offset scale",
    )


@capability
def efficient_kernel() -> Kernel | None:
    """CUDA's memory-efficient kernel: an additive mask, as many key as query heads."""
    return _kernel(
        "efficient_attention",
        "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset "
        "dropout_p grad_input_mask is_causal scale",
    )
