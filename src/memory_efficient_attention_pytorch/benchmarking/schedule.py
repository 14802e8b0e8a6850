"""Schedule the runs of a comparison and forecast how long each takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import median
from typing import TYPE_CHECKING

from ..common.errors import require, require_positive_int
from ..models.config import knob
from .shape import Shape

if TYPE_CHECKING:  # imports PyTorch, for which the command line's help does not wait
    from .systems import System


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison: what to compare, and how long to measure.

    ``base`` is compared in ``rounds`` rounds of ``repeats`` timed steps after a first one; besides, there is one run
    for each other value of ``lengths``, ``depths`` (at ``sweep_seq_len`` tokens) and ``vocabularies`` (likewise).
    A run whose step is expected to take longer than ``step_limit`` seconds is left out and reported as such; within a
    run, steps are repeated until ``patience`` seconds have passed. ``keep_freed``: faster, with a little more memory.
    """

    base: Shape = field(default_factory=Shape)
    rounds: int = field(default=3, metadata=knob("rounds at the compared shape"))
    repeats: int = field(default=5, metadata=knob("most timed steps in a process"))
    lengths: tuple[int, ...] = field(
        default=(1024, 2048, 4096, 16384, 32768, 65536, 131072), metadata=knob("sequence lengths")
    )
    depths: tuple[int, ...] = field(default=(2, 8, 24), metadata=knob("layers"))
    vocabularies: tuple[int, ...] = field(default=(256, 32000), metadata=knob("vocabularies"))
    sweep_seq_len: int = field(default=4096, metadata=knob("tokens in depth and vocabulary runs"))
    step_limit: float = field(default=150.0, metadata=knob("leave out runs with steps of more seconds"))
    patience: float = 20.0
    device: str = field(default="cpu", metadata=knob("cpu, cuda or cuda:N"))
    threads: int | None = field(default=None, metadata=knob("CPU threads", unset="PyTorch's"))
    keep_freed: bool = field(
        default=False, metadata=knob("let the allocator keep freed blocks below 4 MiB, as mea train does")
    )

    def __post_init__(self) -> None:
        require_positive_int("rounds", self.rounds)
        require_positive_int("repeats", self.repeats)
        if self.threads is not None:
            require_positive_int("threads", self.threads)
        require(self.step_limit > 0, "step_limit", "a number of seconds above 0", self.step_limit)


QUICK = Settings(
    base=Shape(seq_len=256, dim=64, depth=2, heads=4),
    rounds=1,
    lengths=(128,),
    depths=(),
    vocabularies=(),
    sweep_seq_len=128,
)


@dataclass(frozen=True)
class Job:
    """One run of one system in a process of its own. ``experiment``: compare, length, depth or vocabulary."""

    experiment: str
    round: int
    system: System
    shape: Shape
    repeats: int


def schedule(settings: Settings, systems: Sequence[System]) -> list[Job]:
    """Return all runs in order.

    Shapes go from cheap to costly, so that each system's speed is known before its long runs. Within a round systems
    take turns, so that other load on the machine affects all of them alike.
    """
    base = settings.base
    lengths = [replace(base, seq_len=length) for length in sorted(set(settings.lengths) - {base.seq_len})]
    shorter = [shape for shape in lengths if shape.seq_len < base.seq_len]
    longer = [shape for shape in lengths if shape.seq_len > base.seq_len]
    at_sweep = replace(base, seq_len=settings.sweep_seq_len)
    depths = [replace(at_sweep, depth=depth) for depth in sorted(set(settings.depths))]
    vocabularies = [
        replace(at_sweep, depth=min(2, base.depth), num_tokens=size) for size in sorted(set(settings.vocabularies))
    ]

    def in_turn(experiment: str, shapes: Iterable[Shape], repeats: int, rounds: int = 1) -> list[Job]:
        return [
            Job(experiment, round_, system, shape, repeats)
            for shape in shapes
            for round_ in range(rounds)
            for system in systems
        ]

    return [
        *in_turn("length", shorter, settings.repeats),
        *in_turn("compare", [base], settings.repeats, settings.rounds),
        *in_turn("depth", depths, 0),
        *in_turn("vocabulary", vocabularies, 0),
        *in_turn("length", longer, settings.repeats),
    ]


@dataclass
class Forecast:
    """Predicts seconds from earlier runs: a step's by the system's seconds per operation, and a run's overhead.

    A system that has not run yet gets the median of the others; before any run nothing is predicted.
    """

    patience: float
    _rates: dict[str, float] = field(default_factory=dict)
    _overheads: dict[str, float] = field(default_factory=dict)

    def learn(self, job: Job, step_seconds: float, steps: int, run_seconds: float) -> None:
        self._rates[job.system.name] = step_seconds / _operations(job)
        self._overheads[job.system.name] = max(0.0, run_seconds - steps * step_seconds)

    def step_seconds(self, job: Job) -> float | None:
        if not self._rates:
            return None
        rate = self._rates.get(job.system.name, median(self._rates.values()))
        return rate * _operations(job)

    def run_seconds(self, job: Job, limit: float) -> float:
        step = self.step_seconds(job)
        if step is None or step > limit:
            return 0.0
        repeated = min(job.repeats, ceil(max(0.0, self.patience - step) / step))
        return self._overheads.get(job.system.name, median(self._overheads.values())) + (1 + repeated) * step


def _operations(job: Job) -> int:
    return job.shape.forward_flops(job.system.window)
