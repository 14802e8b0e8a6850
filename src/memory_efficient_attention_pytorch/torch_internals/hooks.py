"""Hooks of modules, tensors and graph nodes; and a module's children, parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .capabilities import capability

_AROUND_FORWARD = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    "_forward_hooks_always_called",
)
_KINDS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


@capability
def hooks_of_modules() -> tuple[str, ...] | None:
    """The attributes of a module that hold its hooks."""
    module, names = nn.Module(), tuple(f"_{kind}" for kind in _KINDS)
    return names if all(isinstance(getattr(module, name), Mapping) for name in names) else None


@capability
def hooks_of_all_modules() -> tuple[Mapping[int, Any], ...]:
    """The registries of global module hooks."""
    return tuple(getattr(torch.nn.modules.module, f"_global_{kind}") for kind in _KINDS)


@capability
def hooks_of_tensors() -> str | None:
    """The attribute of a tensor that holds the hooks of ``Tensor.register_hook``."""
    return "_backward_hooks" if hasattr(Tensor, "_backward_hooks") else None


def module_has_hooks(module: nn.Module) -> bool:
    """True if the module has hooks, or if PyTorch cannot tell."""
    names = hooks_of_modules()
    return names is None or any(getattr(module, name) for name in names)


def forward_hooks(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks that run around the module's forward, and their flags, as copies; none if PyTorch cannot tell."""
    return [dict(vars(module).get(name, ())) for name in _AROUND_FORWARD]


def put_forward_hooks(module: nn.Module, hooks: list[dict[int, Any]]) -> None:
    """Put these hooks in place of the module's."""
    for name, wanted in zip(_AROUND_FORWARD, hooks, strict=True):
        held = vars(module).get(name)
        if held is not None:
            held.clear()
            held.update(wanted)


def has_pre_hooks(module: nn.Module) -> bool:
    """True if hooks run before the module's forward, or if PyTorch cannot tell."""
    return bool(getattr(module, "_forward_pre_hooks", True))


def all_modules_have_hooks() -> bool:
    """True if there are global module hooks, or if PyTorch cannot tell."""
    kinds = hooks_of_all_modules()
    return kinds is None or any(kinds)


def tensor_has_hooks(tensor: Tensor) -> bool:
    """True if the tensor has hooks that see or change its gradient, or if PyTorch cannot tell."""
    name = hooks_of_tensors()
    return name is None or bool(getattr(tensor, name))


def node_has_hooks(node: Node) -> bool:
    """True if hooks were registered on the node itself."""
    # Nothing lists them, but a new one is put into one dictionary with the others.
    for register in (node.register_prehook, node.register_hook):
        handle: Any = register(lambda *_: None)
        others = len(handle.hooks_dict_ref()) - 1
        handle.remove()
        if others:
            return True
    return False


def put_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the module's parameter (or plain attribute) by ``tensor``, of any class, as ``functional_call`` does."""
    places: dict[str, Any] = module._parameters if name in module._parameters else vars(module)
    places[name] = tensor


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's children by name, a shared one under each of its names."""
    return dict(module._modules)


def with_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> Any:
    """A shallow copy of the module with these children, which shares all else."""
    changed = copy.copy(module)
    changed.__dict__["_modules"] = dict(children)
    return changed


def get_buffer(module: nn.Module, name: str) -> Tensor | None:
    """The module's buffer of this name, or None."""
    return module._buffers.get(name)


def put_buffer(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Replace the module's buffer of this name. Not as an attribute: an ``nn.Parameter`` would become a parameter."""
    module._buffers[name] = tensor
