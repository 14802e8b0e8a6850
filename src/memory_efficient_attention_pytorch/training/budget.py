"""Choose a run's settings by memory: the fastest within a budget or the free memory; report predicted and measured."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..common.sizes import available_memory, format_size, parse_size
from ..models.config import SETTINGS
from ..planner import Option, Plan, plan
from ..planner.candidates import candidates, leanest
from .config import TrainConfig
from .files import png
from .model import build_model, model_keywords
from .optimizer import adamw
from .plot import picture
from .resources import memory_now, memory_peak, pick_precision, resolve, return_freed_blocks, trim_heap, warm_up

if TYPE_CHECKING:
    from accelerate import Accelerator

Division = dict[str, Any]
"""The keys of a TrainConfig that say how the processes of a run share its step."""

_MIB = 1 << 20
_BESIDE = 16 * _MIB
"""RAM that a run takes beside its steps: batches, records, plots, checkpoints, accelerate's own state."""
_NOISE = 8 * _MIB
"""By how much a process's memory varies from one start to the next."""
_KEPT_FREE = 8
"""Without a budget one part in so many of what is free stays so, for what others begin and what the allocator holds."""
_DOUBLINGS = 3
"""How often the number of processes is doubled in search of one with which a step fits."""
_HELD_BYTES = 64 << 10
"""Freed blocks smaller than this may be held by the allocator: few, so that resident memory is what is live."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """A run's memory: budget, predicted peak and, at its end, measured peak, in bytes of one process.

    On a CPU these are its resident set, interpreter and libraries included; on an accelerator, PyTorch's allocations
    there. before: in use before the model is built. choice: what was chosen and why.
    """

    kind: str
    budget: int
    before: int
    predicted: int
    choice: str
    measured: int | None = None

    def announcement(self) -> str:
        """Return one line on the predicted memory."""
        return (
            f"memory: {format_size(self.predicted)} predicted at the peak of the {format_size(self.budget)} allowed "
            f"({self.kind}, {format_size(self.before)} of it before the model); {self.choice}"
        )

    def result(self) -> str:
        """Return one line on the predicted and the measured memory."""
        assert self.measured is not None
        verdict = "within" if self.measured <= self.budget else "BEYOND"
        return (
            f"{format_size(self.measured)} at the peak, {format_size(self.predicted)} predicted "
            f"({self.predicted / self.measured - 1:+.1%}), {verdict} the {format_size(self.budget)} allowed "
            f"({self.kind}, {format_size(self.before)} of it before the model)"
        )


def preload(device: torch.device) -> None:
    """Load what a run loads on first use, so that it counts as memory taken before the model.

    Also have the C library return freed memory: blocks that it holds could not be predicted.
    """
    return_freed_blocks(_HELD_BYTES)
    warm_up(str(device))
    plan({"num_tokens": 2, "dim": 2, "depth": 1, "heads": 1, "dim_head": 2}, batch_size=1, seq_len=2, device=device)
    with contextlib.suppress(ImportError):  # reported when there is something to plot
        png(picture([]))
    trim_heap()


def least_free(accelerator: "Accelerator") -> int | None:
    """Return the bytes free on the device that has least of all processes' own; None where that is not known.

    All processes have to ask, since each sees its own device.
    """
    from accelerate.utils import gather_object

    own: int | None = None
    with contextlib.suppress(NotImplementedError):
        own = available_memory(accelerator.device)
    found = gather_object([own])
    return None if None in found else min(found)


def within_budget(
    config: TrainConfig,
    device: torch.device,
    num_tokens: int,
    *,
    processes: int = 1,
    settled: bool = False,
    free: int | None = None,
) -> tuple[TrainConfig, Memory]:
    """Return the configuration with the fastest settings that keep each process's step within the budget.

    Settings that it has stay as they are, and all of them where they are `settled`, as in a run that goes on; a budget
    of "auto" becomes a size, by what is `free` (`least_free`). Several processes share the model, and then the tokens,
    only where nothing fits otherwise. Call `preload` before. Raises ValueError, with the changes that would make it
    fit, where nothing does.
    """
    before = memory_now(device)
    budget = _budget(config, device, before, processes, free)
    beside = before + (0 if device.type == "cuda" else _BESIDE)
    # Another process, or this run when it goes on, may itself take a little more than this one.
    room = budget - beside - (0 if settled else _NOISE)

    def divided(division: Division, number: int = processes) -> _Step:
        return _Step(config.updated(division), device, num_tokens, number, settled)

    def fits(division: Division, number: int = processes) -> bool:
        step = divided(division, number)
        return step.leanest + step.buckets <= room

    *others, last = [{}] if settled else _divisions(config, device, processes)
    division = next(filter(fits, others), last)
    step = divided(division)
    made, standing = step.planned(room - step.buckets), beside + step.buckets
    if not made.fits():
        # What is free on a CPU would be shared by more.
        shared = config.memory_budget == "auto" and device.type == "cpu"
        enough = "" if settled or shared or room <= 0 else _enough_processes(config, device, processes, fits)
        raise ValueError(_refusal(made, budget, standing, 0 if settled else _NOISE, enough))
    chosen = step.config.updated(made.settings)
    if config.memory_budget == "auto":
        chosen = chosen.updated({"memory_budget": f"{budget // _MIB}MiB"})
    # The process's peak includes what was in use for a moment before, such as for tokenising.
    predicted = max(standing + made.peak_bytes, memory_peak(device))
    choice = _choice(chosen, made.options, standing) + _division_in_words(resolve(config, device), division)
    return chosen, Memory(_kind(device), budget, before, predicted, choice)


def fastest_that_fits(
    config: TrainConfig, device: torch.device, num_tokens: int, *, free: int | None, processes: int = 1
) -> tuple[TrainConfig, str]:
    """Return the configuration with the fastest settings that fit in free memory, and a sentence on what they take.

    For a run without a budget. Settings that were given do not change. If nothing fits, the leanest settings are taken:
    without a limit nothing is refused. Where it is not known how much is free (None), those of `resolve` are taken.
    """
    step = _Step(config, device, num_tokens, processes)
    if not step.leanest_settings:
        return step.config, ""
    if free is None:
        return step.config, f"how much is free on {device} is not known, so reversal and small pieces"
    free = _share(free, device, processes)
    room = free - free // _KEPT_FREE - step.buckets
    if step.leanest > room:
        least = format_size(step.leanest)
        words = f"the leanest settings take {least} where {format_size(free)} is free: it may run out"
        return step.config.updated(step.leanest_settings), words
    made = step.planned(room)
    words = f"{format_size(made.peak_bytes)} for a step, the fastest settings that fit in the {format_size(free)} free"
    if made.peak_bytes > step.leanest:
        words += f" ({made.options[-1].name}; the leanest would take {format_size(step.leanest)}: see --memory-budget)"
    return step.config.updated(made.settings), words


class _Step:
    """The training step of one process, whose configuration may leave settings open.

    config: the configuration with every open choice made for the machine.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, num_tokens: int, processes: int, settled: bool = False
    ) -> None:
        self.config, self.device, self.processes = resolve(config, device), device, processes
        keywords = model_keywords(self.config, num_tokens)
        left_open = () if settled else _open(config)
        self.given = {name: value for name, value in keywords.items() if name not in left_open}
        # DistributedDataParallel sends gradients in buckets that together are as large as they are.
        replicated = processes > 1 and not self.config.shard
        self.buckets = _parameter_bytes(self.config, num_tokens) if replicated else 0

    @functools.cached_property
    def leanest_settings(self) -> dict[str, Any]:
        """The open settings with which the step takes the least memory."""
        config, mixed_precision = self.config, self.config.precision != "fp32"
        offload = self.device.type == "cuda"
        return leanest(candidates(self.given, config.batch_size, config.seq_len, mixed_precision, offload))

    @functools.cached_property
    def leanest(self) -> int:
        """The peak with these settings, in bytes."""
        return self._plan(self.given | self.leanest_settings, None).peak_bytes

    def planned(self, room: int) -> Plan:
        """Plan the step with the fastest settings for ``room`` bytes."""
        return self._plan(self.given, max(1, room))

    def _plan(self, keywords: dict[str, Any], room: int | None) -> Plan:
        config = self.config
        return plan(
            keywords,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            autocast=None if config.precision == "fp32" else config.precision,
            device=self.device,
            optimizer=lambda parameters: adamw(parameters, config),
            keep_gradients=config.accumulation > 1,
            budget=room,
            shards=self.processes if config.shard else 1,
            context=config.context_parallel or 1,
        )


def _divisions(config: TrainConfig, device: torch.device, processes: int) -> list[Division]:
    """Return the ways to divide a step over the processes, those with the least communication first.

    What the configuration sets is kept. Where n processes divide the tokens of each window, n times as many batches are
    accumulated, so that a step has as many windows.
    """
    if processes == 1 or pick_precision(config, device) == "fp16":
        return [{}]
    shards = [False, True] if config.shard is None else [config.shard]
    if config.context_parallel is not None:
        return [{"shard": shard, "context_parallel": config.context_parallel} for shard in shards]
    return [
        {"shard": shard, "context_parallel": size, "accumulation": config.accumulation * size}
        for size in range(1, processes + 1)
        if processes % size == 0
        for shard in shards
    ]


def _enough_processes(
    config: TrainConfig, device: torch.device, processes: int, fits: Callable[[Division, int], bool]
) -> str:
    """Return how many processes would be enough, found by doubling, and their options; "" if none would."""
    for number in [processes << more for more in range(1, _DOUBLINGS + 1)]:
        division = _divisions(config, device, number)[-1]
        if division and number <= config.seq_len and fits(division, number):
            sharded = "--shard " if division["shard"] else ""
            batches = f" --accumulation {division['accumulation']}" if "accumulation" in division else ""
            return f"{number} processes with {sharded}--context-parallel {division['context_parallel']}{batches}"
    return ""


def _division_in_words(config: TrainConfig, division: Division) -> str:
    """Return what was decided about the processes, in words."""
    changed = {name: value for name, value in division.items() if value != getattr(config, name)}
    if not changed:
        return ""
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in changed.items())
    return f"; divided among the processes, since nothing fits otherwise ({shown})"


def _open(config: TrainConfig) -> list[str]:
    """Return the settings that the budget may decide."""
    found = [name for name in SETTINGS if getattr(config, name) is None]
    if config.exact and config.reversible is None:
        found.remove("reversible")  # which exact implies
    elif config.reversible is not None and config.exact is None:
        found.remove("exact")  # which follows from the precision
    return found


def _share(free: int, device: torch.device, processes: int) -> int:
    """Return what one process may take of what is free: those on a CPU share it."""
    return free // (processes if device.type == "cpu" else 1)


def _budget(config: TrainConfig, device: torch.device, before: int, processes: int, free: int | None) -> int:
    assert config.memory_budget is not None
    if config.memory_budget != "auto":
        return parse_size(config.memory_budget, "memory_budget")
    if free is None:
        raise ValueError(f"memory_budget: expected a size, since how much is free on {device} is not known, got 'auto'")
    return before + _share(free, device, processes)


def _choice(chosen: TrainConfig, options: tuple[Option, ...], standing: int) -> str:
    """Return what was chosen and why, in words."""
    *faster, taken = options
    if not taken.settings:
        return "every setting was given before"
    shown = ", ".join(f"{name} {_shown(getattr(chosen, name))}" for name in taken.settings)
    if not faster:
        return f"chosen: {taken.name}, the fastest way there is ({shown})"
    more = format_size(standing + faster[-1].peak_bytes)
    return f"chosen: {taken.name}, since the next faster way, {faster[-1].name}, takes {more} ({shown})"


def _refusal(made: Plan, budget: int, standing: int, spare: int, processes: str) -> str:
    options = {"batch_size": "--batch-size", "seq_len": "--seq-len", "depth": "--depth"}
    remedies = dict(made.remedies)
    if "seq_len" in remedies:
        # Ragged lengths need more compiled kernels.
        length = remedies["seq_len"] - remedies["seq_len"] // 16
        remedies["seq_len"] = length - length % 8 or length
    least = {field.name: field.metadata["low"] for field in dataclasses.fields(TrainConfig)}
    changes = [f"{options[name]} {size}" for name, size in remedies.items() if name in options and size >= least[name]]
    enough = standing + made.remedies["budget"] + _NOISE
    changes.append(f"--memory-budget {-(-enough // _MIB)}MiB")
    changes += [processes] if processes else []
    more = f", and {format_size(spare)} more must stay free" if spare else ""
    return (
        f"memory_budget: the leanest settings take {format_size(standing + made.peak_bytes)} of the "
        f"{format_size(budget)} allowed, {format_size(standing)} of it before the model{more}: "
        f"{' or '.join(changes)} would fit"
    )


def _shown(setting: object) -> str:
    if isinstance(setting, bool):
        return "on" if setting else "off"
    return "auto" if setting is None else str(setting)


def _parameter_bytes(config: TrainConfig, num_tokens: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() * p.element_size() for p in build_model(config, num_tokens).parameters())


def _kind(device: torch.device) -> str:
    return f"PyTorch's allocations on {device}" if device.type == "cuda" else "resident memory of the process"
