"""Where autocast is to keep out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: what runs inside chooses its own dtypes."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
