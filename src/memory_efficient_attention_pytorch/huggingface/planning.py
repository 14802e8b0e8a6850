"""Plan a transformers model's training step, as it is and after make_memory_efficient."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.errors import require
from ..common.sizes import format_size, parse_size
from ..planner import Plan, max_seq_len, plan
from ..planner.step import fake_copy
from .checkpoints import enable_checkpoints, is_checkpointed
from .model import MemoryEfficientForCausalLM
from .undoing import find_model, restore

AS_IT_IS, CHECKPOINTED, EFFICIENT = "as it is", "with its own checkpointing", "after make_memory_efficient"


@dataclass(frozen=True)
class StepPlans:
    """Holds a step's plans by the model's state.

    The states are ``"as it is"`` (unless the model is checkpointed already), ``"with its own checkpointing"`` (if it
    supports that) and ``"after make_memory_efficient"``. longest: with a budget, the longest sequence in tokens that
    fits, by state.
    """

    plans: Mapping[str, Plan]
    longest: Mapping[str, int] = field(default_factory=dict)

    @property
    def after(self) -> Plan:
        """The plan of the changed model."""
        return self.plans[EFFICIENT]

    def __str__(self) -> str:
        needs = ", ".join(f"{format_size(made.peak_bytes)} {state}" for state, made in self.plans.items())
        return f"a step of {self.after.batch_size} × {self.after.seq_len:,} tokens: {needs}"


def load_on_meta(directory: str | Path) -> PreTrainedModel:
    """Build the causal language model that a directory's config.json describes, without memory for weights.

    Raises ValueError if it describes none.
    """
    expected = "a directory with the config.json of a causal language model of transformers"
    require(Path(directory, "config.json").is_file(), "model", expected, str(directory))
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a configuration's values can make its code fail in any way
        raise ValueError(f"model: expected {expected}, got {directory}: {_first_line(error)}") from error
    return find_model(model.train())


def plan_step(
    changed: nn.Module,
    *,
    batch_size: int = 1,
    seq_len: int,
    budget: int | float | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> StepPlans:
    """Plan a step of a model that ``make_memory_efficient`` changed, before and after. The model is not touched.

    The step is on ``(batch_size, seq_len)`` tokens that are their own labels. Further options are those of
    :func:`plan`.

    Raises:
        ValueError: ``seq_len`` exceeds the model's positions, or the model computes no loss from labels.
        NotImplementedError: the model's operations depend on its data, as where experts are chosen; the message names
            the operation.
    """
    positions = _learned_positions(changed)
    require(positions is None or seq_len <= positions, "seq_len", f"at most the model's {positions} positions", seq_len)
    parameter = next(changed.parameters())
    if device is None and parameter.device.type != "meta":
        device = parameter.device
    limit = None if budget is None else parse_size(budget)
    plans, longest = {}, {}
    for state, model in _states(changed):
        given = {**options, "device": device, "example_inputs": ExampleInputs(model)}
        try:
            plans[state] = replace(plan(model, batch_size=batch_size, seq_len=seq_len, **given), budget=limit)
            if limit is not None:
                found = max_seq_len(model, batch_size=batch_size, budget=limit, **given)
                longest[state] = found if positions is None else min(found, positions)
        except NotImplementedError:
            raise
        except RuntimeError as error:  # from an operator that needs values, or does not exist on this device
            raise NotImplementedError(f"the model {state} cannot be dry-run: {_first_line(error)}") from error
    return StepPlans(plans, longest)


def _states(changed: nn.Module) -> list[tuple[str, nn.Module]]:
    before, after = on_meta(changed), on_meta(changed)
    restore(before)
    states = [] if is_checkpointed(before) else [(AS_IT_IS, before)]
    checkpointed = copy.deepcopy(before)
    own = find_model(checkpointed)
    if own.supports_gradient_checkpointing:
        if not is_checkpointed(own):
            enable_checkpoints(own)
        states.append((CHECKPOINTED, checkpointed))
    return [*states, (EFFICIENT, after)]


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy in training mode with weights on the meta device, which take no memory."""
    copied = fake_copy(model, torch.device("meta")).train()
    for layer in copied.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_pre_hook(_without_cache, with_kwargs=True)
    return copied


class ExampleInputs:
    """Makes a training step's inputs from batch size and length: tokens that are their own labels.

    A model that takes a cache gets one that stays empty. Without it transformers looks for packed sequences in the
    positions, assumes them where tensors have no contents, and makes an n × n mask.
    """

    def __init__(self, model: nn.Module) -> None:
        taken = inspect.signature(type(find_model(model)).forward).parameters
        require("labels" in taken, "model", "one that computes a loss from labels", type(find_model(model)).__name__)
        self.others: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
        if "past_key_values" in taken and not isinstance(find_model(model), MemoryEfficientForCausalLM):
            self.others["past_key_values"] = _NoCache()

    def __call__(self, batch_size: int, seq_len: int) -> dict[str, Any]:
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")
        return {"input_ids": tokens, "labels": tokens, **self.others}


class _NoCache(Cache):
    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _without_cache(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Drop the empty cache once masks are made: a checkpointed layer would warn about it."""

    def seen(value: Any) -> Any:
        return None if isinstance(value, _NoCache) else value

    return tuple(map(seen, args)), {name: seen(value) for name, value in kwargs.items()}


def _learned_positions(model: nn.Module) -> int | None:
    """Return how many tokens a model with learned positions can take; None if positions set no limit."""
    base = find_model(model)
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    others = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    tables = [m.num_embeddings for m in base.modules() if isinstance(m, nn.Embedding) and id(m) not in others]
    # Some tables begin with a few positions for padding.
    return most if most is not None and any(most <= rows <= most + 2 for rows in tables) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
