"""Checkpointing of layers by transformers' own mechanism."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..common.errors import require


def is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def enable_checkpoints(model: PreTrainedModel, offload: bool = False) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)
    else:
        require(not offload, "checkpoint", "True: this release of transformers holds no inputs on the host", "cpu")
        model.gradient_checkpointing_enable({"use_reentrant": False})
