"""Change one instance of a transformers model, and report the changes."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, masking_utils

from ..common.errors import require
from . import attention as own_attention
from . import feed_forward, logits, visibility
from .checkpoints import enable_checkpoints, enable_on_host, is_checkpointed
from .model import MemoryEfficientForCausalLM
from .planning import StepPlans, plan_step
from .undoing import HOOKS, OUR_HOOKS, RECORD, Bound, Record, find_model, restore


@dataclass
class Report:
    """Lists what :func:`make_memory_efficient` changed and left, as pairs (part, how) and (part, why not).

    planned: the steps that were planned, in order. model: a weak reference to the changed model.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        >>> from memory_efficient_attention_pytorch.huggingface import Report, make_memory_efficient
        >>> report = make_memory_efficient(model, loss=False)
        >>> isinstance(report, Report), [part for part, how in report.changed]
        (True, ['attention', '2 MLPs', 'layers'])
    """

    model: weakref.ref[nn.Module] = field(repr=False)
    changed: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    planned: list[StepPlans] = field(default_factory=list)

    def plan(self, *, batch_size: int = 1, seq_len: int, **options: Any) -> StepPlans:
        """Plan a step on ``(batch_size, seq_len)`` tokens, before and after the changes, and add it to the report.

        Nothing is computed. Options are those of :func:`planner.plan`; a ``budget`` adds the longest sequence of each.

        Raises:
            ValueError: the model is gone or restored, or has too few positions.
            NotImplementedError: the model's operations depend on its data, as in some mixtures of experts; the message
                names the operation.
        """
        model = self.model()
        require(model is not None, "model", "one that is still alive", None)
        assert model is not None
        self.planned.append(plan_step(model, batch_size=batch_size, seq_len=seq_len, **options))
        return self.planned[-1]

    def __str__(self) -> str:
        lines = [f"changed  {part}: {how}" for part, how in self.changed]
        lines += [f"left     {part}: {why}" for part, why in self.left]
        return "\n".join([*lines, *(f"planned  {step}" for step in self.planned)])


def make_memory_efficient(
    model: nn.Module, *, attention: bool = True, mlp: bool = True, loss: bool = True, checkpoint: bool | str = True
) -> Report:
    """Make a transformers model train in memory linear in its number of tokens. Results stay the same.

    Args:
        model: a ``PreTrainedModel``, or a module that holds one (as peft's). Only this instance is changed, no class.
        attention: run attention in tiles, with masks evaluated per tile.
        mlp: run token-wise MLPs in chunks of tokens, forward and backward.
        loss: with labels, compute the loss without logits; ``outputs.logits`` computes them when used.
        checkpoint: checkpoint the layers by transformers' own mechanism; ``"cpu"`` holds their inputs in pinned
            host memory until backward. True leaves a model that is checkpointed already unchanged.

    Returns:
        A report of what was changed, and what was left and why; it can be printed, and plans a step before and after.

    Raises:
        ValueError: ``model`` contains no transformers model, or one that is changed already.

    Call it after adapters are added, and before the model is compiled, sharded or passed to DDP.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch.huggingface import make_memory_efficient
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        >>> report = make_memory_efficient(model)
        >>> tokens = torch.randint(0, 256, (1, 512))
        >>> model(input_ids=tokens, labels=tokens).loss.backward()
        >>> print(report)
        changed  attention: in tiles, instead of sdpa
        changed  2 MLPs: in chunks of tokens (model.layers.0.mlp … model.layers.1.mlp)
        changed  loss: without logits; outputs.logits are made when touched
        changed  layers: checkpointed
    """
    base = find_model(model)
    marks = {RECORD, feed_forward.OWN}  # also of a part, or of a whole that this is a part of
    unchanged = not any(marks & vars(module).keys() for module in base.modules())
    require(unchanged, "model", "an unchanged one: call restore(model) first", "one changed already")
    require(checkpoint in (True, False, "cpu"), "checkpoint", 'True, False or "cpu"', repr(checkpoint))
    report, record = Report(weakref.ref(model)), Record()
    inside = set(base.modules())
    for name, other in model.named_modules():
        if isinstance(other, PreTrainedModel) and other not in inside:
            report.left.append((name, "another model: call make_memory_efficient on it"))
    base.__dict__[RECORD] = record.entries
    if isinstance(base, MemoryEfficientForCausalLM):
        attention = mlp = loss = checkpoint = False
        report.left.append(("model", "it is memory-efficient by itself"))
    try:
        if attention:
            _change_attention(base, record, report)
        if mlp:
            _change_mlps(base, record, report)
        if loss:
            _change_loss(base, record, report)
        if checkpoint:
            _change_checkpoints(model, base, record, report, offload=checkpoint == "cpu")
    except BaseException:
        restore(model)
        raise
    return report


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    seen: set[int] = set()
    ahead: list[Any] = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while ahead:
        config = ahead.pop()
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config
            ahead += [getattr(config, key, None) for key in config.sub_configs]


_OWNERS: weakref.WeakValueDictionary[int, PreTrainedModel] = weakref.WeakValueDictionary()
"""By a configuration's id, the model that was last changed with it."""

_MAKERS = {name for name in vars(masking_utils) if name.startswith("create_") and name.endswith(("_mask", "_masks"))}


def _change_attention(model: PreTrainedModel, record: Record, report: Report) -> None:
    part = "attention"
    if not model._can_set_attn_implementation():
        report.left.append((part, f"{type(model).__name__} has no exchangeable attention"))
        return
    inner = {type(m) for m in model.modules() if isinstance(m, PreTrainedModel)}
    modules = [vars(sys.modules[kind.__module__]) for kind in inner]
    if not any(names.get(maker) is getattr(masking_utils, maker) for names in modules for maker in _MAKERS):
        report.left.append((part, f"{type(model).__name__} makes its own masks, which would be lost"))
        return
    if model.config.output_attentions:
        report.left.append((part, "its configuration asks for attention weights"))
        return
    if any(type(module).__name__.endswith("Indexer") for module in model.modules()):
        report.left.append((part, f"{type(model).__name__} chooses keys by an indexer, which reads its mask"))
        return
    own_attention.register()
    before = model.config._attn_implementation
    for config in _configs(model):
        # Of a configuration that another model has, too, and that was changed with it: as it was before that.
        owner = _OWNERS.get(id(config))
        known = [] if owner is None else [entry for entry in vars(owner).get(RECORD, ()) if entry[0] is config]
        record.entries += known
        if not known:
            record.note(config, "_attn_implementation_internal")
            record.note(config, "_attn_was_changed")
        _OWNERS[id(config)] = model
        visibility.EAGER.pop(id(config), None)
        if config._attn_implementation == "eager":
            visibility.EAGER[id(config)] = config
    model.set_attn_implementation(visibility.NAME)
    report.changed.append((part, f"in tiles, instead of {before}"))


def _change_mlps(model: PreTrainedModel, record: Record, report: Report) -> None:
    changed: list[str] = []
    for name, module, why_not in feed_forward.candidates(model):
        if why_not is not None:
            report.left.append((name, why_not))
            continue
        record.set(module, feed_forward.OWN, module.__dict__.get("forward"))
        record.set(module, "forward", Bound(feed_forward.chunked_forward, module))
        changed.append(name)
    if changed:
        report.changed.append((f"{len(changed)} MLPs", f"in chunks of tokens ({changed[0]} … {changed[-1]})"))
    elif not any("experts" in why for _, why in report.left):
        report.left.append(("MLPs", "none was recognised"))


def _change_loss(model: PreTrainedModel, record: Record, report: Report) -> None:
    why_not = logits.objection(model)
    if why_not is None and "forward" in {**model.__dict__, **model.get_output_embeddings().__dict__}:
        why_not = "its forward, or its head's, is already replaced"
    if why_not is not None:
        report.left.append(("loss", why_not))
        return
    head = model.get_output_embeddings()
    record.set(head, "forward", Bound(logits.head_forward, head))
    record.set(model, "forward", Bound(logits.forward_with_lazy_logits, model, type(model).forward))
    record.set(model, "_loss_function", logits.causal_lm_loss)
    report.changed.append(("loss", "without logits; outputs.logits are made when touched"))


_OF_KEYS = ("PREFIX_TUNING", "CARTRIDGE")


def _change_checkpoints(
    whole: nn.Module, model: PreTrainedModel, record: Record, report: Report, *, offload: bool
) -> None:
    part = "layers"
    if not model.supports_gradient_checkpointing:
        report.left.append((part, f"{type(model).__name__} does not support checkpointing"))
        return
    if not any(hasattr(module, "gradient_checkpointing") for module in model.modules()):
        report.left.append((part, f"{type(model).__name__} has none that can be checkpointed"))
        return
    if is_checkpointed(model) and not offload:
        report.left.append((part, "checkpointed already"))
        return
    kind = getattr(getattr(whole, "active_peft_config", None), "peft_type", None)
    if kind in _OF_KEYS:
        report.left.append((part, "learned keys are passed as a cache, which transformers' checkpointing drops"))
        return
    for module in model.modules():
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            record.note(module, name)
    before = {name: model.__dict__[name] for name in (HOOKS, "_require_grads_hook") if name in model.__dict__}
    enable_checkpoints(model, offload)
    hooks = model.__dict__.get(HOOKS)
    if before.get(HOOKS) and hooks is not before[HOOKS]:
        for hook in hooks or ():  # a second set, in place of the only list of the first
            hook.remove()
        model.__dict__.update(before)
    elif hooks and not before.get(HOOKS):
        for name in (HOOKS, "_require_grads_hook"):
            record.entries.append((model, name, before.get(name), name in before, model.__dict__.get(name)))
        record.note(model, OUR_HOOKS, hooks)
    if offload:
        # Trainer turns checkpointing on again where its arguments ask for it.
        for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
            if hasattr(model, name):
                record.set(model, name, Bound(partial(enable_on_host, name), model))
    report.changed.append((part, "checkpointed" + (", their inputs in pinned host memory" if offload else "")))
