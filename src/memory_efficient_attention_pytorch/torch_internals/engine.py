"""What autograd knows: of the pass at work, of changes in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .capabilities import capability


@capability
def will_execute() -> Callable[[Node], bool]:
    """A function that tells whether the pass at work will come to a node; RuntimeError where no ``.backward()`` is."""
    return torch._C._will_engine_execute_node


@capability
def keeps_graph() -> Callable[[], bool]:
    """A function that tells whether the graph of the pass at work is kept for another."""
    return torch._C._autograd._get_current_graph_task_keep_graph


def accumulates(node: Node) -> bool:
    """True inside a ``.backward()`` that will come to this node; False where PyTorch does not tell."""
    ask = will_execute()
    try:
        return ask is not None and ask(node)
    except RuntimeError:  # there is no pass, or it is one of torch.autograd.grad
        return False


def graph_is_kept() -> bool:
    """True where another pass may go through the graph of this one, and where PyTorch does not tell."""
    ask = keeps_graph()
    return ask is None or ask()


@capability
def version_attribute() -> str | None:
    """The attribute that counts how often a tensor was changed in place."""
    return "_version" if hasattr(Tensor, "_version") else None


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; always 0 where PyTorch does not tell, as of an inference tensor."""
    name = version_attribute()
    return 0 if name is None or tensor.is_inference() else getattr(tensor, name)
