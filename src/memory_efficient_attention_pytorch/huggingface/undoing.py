"""Undo changes to a model from a record of the previous contents of objects' ``__dict__``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..common.errors import require

RECORD = "_memory_efficient_changes"
HOOKS = "_require_grads_hooks"  # set by transformers: checkpointing makes embeddings require gradients
OUR_HOOKS = "_memory_efficient_hooks"


def find_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model that is or is in ``model``; raises ValueError if there is none."""
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    require(found is not None, "model", "a model of transformers, or a module that holds one", type(model).__name__)
    assert found is not None
    return found


class Record:
    """The previous contents of objects' ``__dict__``. When copied with a model, it refers to the copy."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, str, Any, bool, Any]] = []

    def note(self, holder: Any, name: str, value: Any = ...) -> None:
        """Remember an attribute that is about to be set, to ``value`` if that is known."""
        self.entries.append((holder, name, holder.__dict__.get(name), name in holder.__dict__, value))

    def set(self, holder: Any, name: str, value: Any) -> None:
        self.note(holder, name, value)
        holder.__dict__[name] = value


class Bound:
    """``function(module, …)`` as a module's forward: copied and pickled with the module, as a method of its class is.

    signature: of which function, without its first parameter, it has the signature.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, signature: Callable[..., Any] | None = None):
        self.function, self.module = function, module
        if signature is not None:
            whole = inspect.signature(signature)
            self.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate makes a method of whatever forward it unwraps.
        given = args[1:] if args and args[0] is self.module else args
        return self.function(self.module, *given, **kwargs)


def restore(model: nn.Module) -> None:
    """Undo ``make_memory_efficient``: restore every attribute that it set.

    Raises:
        ValueError: the model was not changed.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        >>> from memory_efficient_attention_pytorch.huggingface import make_memory_efficient, restore
        >>> report = make_memory_efficient(model)
        >>> restore(model)
    """
    base = find_model(model)
    require(RECORD in base.__dict__, "model", "one that make_memory_efficient changed", "an unchanged one")
    record = base.__dict__.pop(RECORD)
    for holder, name, value, was_there, made in reversed(record):
        if name == OUR_HOOKS:
            for hook in made:
                hook.remove()
        elif made is not ... and holder.__dict__.get(name) is not made:
            continue  # somebody's by now, as accelerate's around it, which goes on to what is restored
        elif was_there:
            holder.__dict__[name] = value
        else:
            holder.__dict__.pop(name, None)
