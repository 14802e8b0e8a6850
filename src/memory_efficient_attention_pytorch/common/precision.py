"""What is computed in which dtype: at least fp32 where rounding would add up, autocast's where it is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 at least: of sums, softmax, norms and whatever else is no matrix product."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on the device, None where it is off."""
    kind = device.type
    # A compiler does not follow the first question (PyTorch 2.11), and meets no device of which the second is an error.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    on = known and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """What a linear layer computes in: autocast's dtype where it is on, else the tokens' own, as for fp64."""
    return tokens.dtype if tokens.dtype == torch.float64 else autocast_dtype(tokens.device) or tokens.dtype


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: what runs inside chooses its own dtypes."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
