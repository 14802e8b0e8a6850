"""The mark by which torch.compile knows what to leave alone; imported by :mod:`.compiled` where a compiler runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="attention in tiles, pieces, reversal and the loss run eagerly")  # type: ignore[untyped-decorator]
def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
