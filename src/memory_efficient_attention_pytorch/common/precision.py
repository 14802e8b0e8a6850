"""Compute dtypes: at least fp32 where rounding errors accumulate, autocast's where it is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, softmax and norms: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype on the device, None where it is off."""
    kind = device.type
    # A compiler does not follow the first question (PyTorch 2.11), and meets no device of which the second is an error.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    on = known and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's where it is on (not for fp64), else the tokens' own."""
    return tokens.dtype if tokens.dtype == torch.float64 else autocast_dtype(tokens.device) or tokens.dtype


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off inside the context."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
