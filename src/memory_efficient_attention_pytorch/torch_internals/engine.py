"""Autograd's state: the running backward pass, and in-place changes of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .capabilities import capability


@capability
def will_execute() -> Callable[[Node], bool]:
    """A function that tells whether the running pass will reach a node; RuntimeError outside of ``.backward()``."""
    return torch._C._will_engine_execute_node


@capability
def keeps_graph() -> Callable[[], bool]:
    """A function that tells whether the running pass retains its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph


def accumulates(node: Node) -> bool:
    """True inside a ``.backward()`` that will reach this node; False if PyTorch cannot tell."""
    ask = will_execute()
    try:
        return ask is not None and ask(node)
    except RuntimeError:  # there is no pass, or it is one of torch.autograd.grad
        return False


def graph_is_kept() -> bool:
    """True if the running pass retains its graph, or if PyTorch cannot tell."""
    ask = keeps_graph()
    return ask is None or ask()


@capability
def version_attribute() -> str | None:
    """The name of the attribute that counts a tensor's in-place changes."""
    return "_version" if hasattr(Tensor, "_version") else None


def version(tensor: Tensor) -> int:
    """The number of the tensor's in-place changes; 0 if PyTorch cannot tell, as for an inference tensor."""
    name = version_attribute()
    return 0 if name is None or tensor.is_inference() else getattr(tensor, name)
