"""Who watches a module, a parameter or a node of the graph; and what a module holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .capabilities import capability

_KINDS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


@capability
def hooks_of_modules() -> tuple[str, ...] | None:
    """Attributes of a module that hold its hooks."""
    module, names = nn.Module(), tuple(f"_{kind}" for kind in _KINDS)
    return names if all(isinstance(getattr(module, name), Mapping) for name in names) else None


@capability
def hooks_of_all_modules() -> tuple[Mapping[int, Any], ...]:
    """Where hooks on all modules there are are registered."""
    return tuple(getattr(torch.nn.modules.module, f"_global_{kind}") for kind in _KINDS)


@capability
def hooks_of_tensors() -> str | None:
    """The attribute of a tensor that holds the hooks of ``Tensor.register_hook``."""
    return "_backward_hooks" if hasattr(Tensor, "_backward_hooks") else None


def module_is_watched(module: nn.Module) -> bool:
    """True where the module has hooks, and where PyTorch does not tell."""
    names = hooks_of_modules()
    return names is None or any(getattr(module, name) for name in names)


def all_modules_are_watched() -> bool:
    """True where there are hooks on all modules, and where PyTorch does not tell."""
    kinds = hooks_of_all_modules()
    return kinds is None or any(kinds)


def tensor_is_watched(tensor: Tensor) -> bool:
    """True where the tensor has hooks that see or change its gradient, and where PyTorch does not tell."""
    name = hooks_of_tensors()
    return name is None or bool(getattr(tensor, name))


def node_is_watched(node: Node) -> bool:
    """True where hooks have been registered on the node itself."""
    # Nothing lists them, but a new one is put into one dictionary with the others.
    for register in (node.register_prehook, node.register_hook):
        handle: Any = register(lambda *_: None)
        others = len(handle.hooks_dict_ref()) - 1
        handle.remove()
        if others:
            return True
    return False


def put_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let the module's parameter of this name be ``tensor``, of any class, as ``torch.func.functional_call`` does."""
    module._parameters[name] = tensor  # type: ignore[assignment]


def get_buffer(module: nn.Module, name: str) -> Tensor | None:
    """The module's buffer of this name, if it has any by now."""
    return module._buffers.get(name)


def put_buffer(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Let the module's buffer of this name be ``tensor``."""
    module._buffers[name] = tensor
