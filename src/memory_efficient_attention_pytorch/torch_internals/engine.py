"""What autograd's engine is doing at this moment."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .capabilities import capability


@capability
def keeps_graph() -> Callable[[], bool]:
    """A function: is the graph of the pass at work kept for another?"""
    return torch._C._autograd._get_current_graph_task_keep_graph


def graph_is_kept() -> bool:
    """May another pass go through the graph of this one? True where PyTorch does not tell."""
    ask = keeps_graph()
    return ask is None or ask()
