"""Compute dtypes: at least fp32 where rounding errors accumulate, autocast's where it is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .errors import require

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The floating-point dtypes that PyTorch multiplies and sums in."""


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, softmax and norms: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def is_integer(tensor: Tensor) -> bool:
    """Return whether the tensor holds integers, of any width; booleans are none."""
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype on the device, None if it is off."""
    kind = device.type
    # PyTorch 2.11's compiler cannot trace is_autocast_available; on its devices is_autocast_enabled does not raise.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    on = known and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """Return the dtype a linear layer computes in: autocast's if it is on (not for fp64), else the tokens' own."""
    return tokens.dtype if tokens.dtype == torch.float64 else autocast_dtype(tokens.device) or tokens.dtype


def require_dtype_of(weight: Tensor, argument: str, x: Tensor) -> None:
    """Raise ValueError for tokens of another dtype than a layer's weights, unless autocast casts both."""
    fits = x.dtype == weight.dtype or autocast_dtype(x.device) is not None
    require(fits, argument, f"dtype {weight.dtype}, that of the weights", x.dtype)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off inside the context."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
