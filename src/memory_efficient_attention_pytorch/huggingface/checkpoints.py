"""Checkpoint layers by transformers' own mechanism."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..recompute.host_inputs import InputsOnHost


def is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def enable_checkpoints(model: PreTrainedModel, offload: bool = False) -> None:
    """Turn on checkpointing. offload: the layers' inputs wait in host memory (:class:`InputsOnHost`)."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    if offload:
        _keep_on_host(model)


def enable_on_host(name: str, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Turn checkpointing on by the class's method of this name, inputs on the host."""
    getattr(type(model), name)(model, *args, **kwargs)
    _keep_on_host(model)


def _keep_on_host(model: PreTrainedModel) -> None:
    own: dict[int, Any] = {}
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        # Layers that share one keep sharing: it knows the order of inputs.
        if function is not None and not isinstance(function, InputsOnHost):
            module.__dict__[_FUNCTION] = own.setdefault(id(function), InputsOnHost(function))


_FUNCTION = "_gradient_checkpointing_func"
