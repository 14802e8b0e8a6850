"""Run one training step of the real code on fake tensors: nothing is computed, every allocation is seen."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..common.divided import within
from ..common.dry_run import STAND_IN, watched_by
from ..common.errors import require
from ..torch_internals.fake import fake_tensors
from ..torch_internals.trees import tree_leaves, tree_map_only
from .accounting import Accounting
from .ledger import Ledger, Place
from .processes import ShardedParameters, divided_tokens
from .stand_in import standing_in
from .timeline import Timeline

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
OptimizerMaker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Step:
    """A step to dry-run.

    ``args`` and ``kwargs`` go to the model's forward; only the shapes and dtypes of their tensors matter, which may be
    on any device, ``meta`` included. ``loss`` turns the model's output into a scalar; None means no training, only a
    forward pass in eval mode, followed by one with ``then`` in place of ``args`` if given. ``dtype``: of parameters and
    floating-point buffers (None: unchanged). ``autocast``: the dtype of mixed precision (None: off).
    ``keep_gradients``: whether gradients exist when the step begins, as in gradient accumulation; otherwise backward
    allocates them. ``shards``: processes that parameters are sharded over. ``context``: (tokens of the whole sequence,
    processes they are divided over), or None.
    """

    model: nn.Module
    loss: Callable[[Any], Tensor] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str | OptimizerMaker | None = "adamw"
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    then: tuple[Any, ...] = ()
    keep_gradients: bool = True
    shards: int = 1
    context: tuple[int, int] | None = None


def dry_run(step: Step, accounting: Accounting, *, every_part: bool = False) -> Timeline:
    """Record a training step other than the first: the optimizer's state exists when it begins.

    The model is not touched: a copy gets fake parameters and buffers. ``every_part``: run all iterations of this
    package's loops over equal parts, which changes nothing but the time.

    Raises NotImplementedError, naming the operation, for a model whose shapes depend on the data or that reads values.
    """
    kinds = fake_tensors()
    if kinds is None:
        raise NotImplementedError("this PyTorch has no fake tensors, which a dry run needs")
    planned = accounting.device.type
    device = torch.device("cpu") if planned == "cpu" else STAND_IN
    with ExitStack() as entered:
        entered.enter_context(torch.autograd.set_multithreading_enabled(False))
        entered.enter_context(torch.inference_mode(False))  # which enables gradients, too
        entered.enter_context(kinds.mode())
        model = fake_copy(step.model, device, step.dtype)
        args, kwargs, then = tree_map_only(
            Tensor, lambda tensor: _fake(tensor, device), (step.args, dict(step.kwargs), step.then)
        )
        ledger = Ledger(accounting, device, categorizer(model), kinds.refusals, every_part)
        ledger.follow(model)
        sharded = ShardedParameters(model, step.shards) if step.shards > 1 else None
        entered.enter_context(within(divided_tokens(*step.context) if step.context else None))
        entered.enter_context(ledger)
        entered.enter_context(nullcontext() if planned == "cpu" else standing_in(planned))
        entered.enter_context(watched_by(ledger))
        ledger.learn_the_engine()
        autocast = torch.autocast("cpu", step.autocast, enabled=step.autocast is not None)
        if sharded is not None:
            sharded.charge_to(ledger)
        ledger.enter("parameters", [*model.parameters(), *model.buffers()])
        ledger.enter("streams", (leaf for leaf in tree_leaves((args, kwargs, then)) if isinstance(leaf, Tensor)))

        def call(phase: str, arguments: tuple[Any, ...]) -> Any:
            with ledger.during(phase), _contents_asked_for(ledger):
                return model(*arguments, **kwargs)

        if step.loss is None:
            model.eval()
            ledger.start()
            with torch.no_grad(), autocast:
                call("forward", args)
                if then:
                    call("next token", then)
        else:
            trained = [p for p in (sharded.shards if sharded else model.parameters()) if p.requires_grad]
            optimizer = _set_up(trained, step, ledger, at_once=planned == "cuda")
            ledger.start()
            with autocast:
                output = call("forward", args)
                with ledger.during("loss"):
                    loss = step.loss(output)
            del output
            with ledger.during("backward"):
                loss.backward()
                if sharded is not None:
                    sharded.finish()
            if optimizer is not None:
                with ledger.during("optimizer"):
                    optimizer.step()
    return ledger.timeline()


@contextmanager
def _contents_asked_for(ledger: Ledger) -> Iterator[None]:
    """Report a call of Tensor.numpy, which a dispatch mode does not see."""
    try:
        yield
    except RuntimeError as error:
        if ".numpy() is not supported" not in str(error):
            raise
        raise NotImplementedError(
            f"Tensor.numpy in the {ledger.phase} cannot be dry-run: it reads values, and fake tensors have none"
        ) from error


def _set_up(trained: list[nn.Parameter], step: Step, ledger: Ledger, at_once: bool) -> torch.optim.Optimizer | None:
    """Allocate what exists before a training step besides the model: optimizer state and, if kept, gradients.

    at_once: whether the device's optimizers update all parameters at once by default.
    """
    with ledger.during("gradients"):
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    optimizer = None
    if step.optimizer is not None and trained:
        with ledger.during("optimizer"):
            optimizer = _optimizer(step.optimizer, trained, at_once)
            optimizer.step()
    if not step.keep_gradients:
        for parameter in trained:
            parameter.grad = None
        ledger.gradients_of(trained)
    return optimizer


def _optimizer(choice: str | OptimizerMaker, parameters: list[nn.Parameter], at_once: bool) -> torch.optim.Optimizer:
    if isinstance(choice, str):
        require(choice in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}, a function or None", repr(choice))
        make: Any = OPTIMIZERS[choice]
        optimizer: torch.optim.Optimizer = make(parameters, lr=1e-3)
    else:
        optimizer = choice(parameters)
    for group in optimizer.param_groups:
        # PyTorch's default depends on the type of the parameters, which here are fake.
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = at_once
    return optimizer


def fake_copy(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy the model with fake tensors in place of its own; tied ones stay tied, and no memory is allocated."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        fake = _fake(tensor, device, dtype if tensor.is_floating_point() else None)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    # Other tensors that a module holds are on the device if they were on one, else on the host.
    for held in (leaf for module in model.modules() for leaf in tree_leaves(vars(module))):
        if isinstance(held, Tensor) and (held.device.type != "cpu" or not held.is_leaf):
            memo.setdefault(id(held), _fake(held, torch.device("cpu") if held.device.type == "cpu" else device))
    return copy.deepcopy(model, memo)


def _fake(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=device)
    return shape.requires_grad_(tensor.requires_grad)


def categorizer(model: nn.Module) -> Callable[[str, Place], str]:
    """Return a function that assigns a new storage to a category.

    By the phase, else by the innermost enclosing module whose class name tells its category.
    """
    classes = {path: type(module).__name__ for path, module in model.named_modules()}

    @cache
    def of_module(path: str) -> str:
        while path:
            for category, pattern in _CLASSES.items():
                if pattern.search(classes.get(path, "")):
                    return category
            path = path.rpartition(".")[0]
        return "streams"

    def categorize(phase: str, place: Place) -> str:
        if phase in ("gradients", "optimizer"):
            return phase
        return "loss" if place.phase == "loss" else of_module(place.module)

    return categorize


_CLASSES = {
    "attention": re.compile(r"attention|attn", re.IGNORECASE),
    "feed-forward": re.compile(r"feed_?forward|mlp|ffn|moe|expert", re.IGNORECASE),
}
