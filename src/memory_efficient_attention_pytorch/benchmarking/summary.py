"""Summarise the runs of a comparison by medians, paired ratios and growth exponents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from .results import Results, Run
from .systems import REFERENCE

MIB = 1024**2
GROWTH_FROM = 4096  # tokens; below, a step's fixed costs hide its growth


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds of the compared shape.

    The ratios are medians of those to ``REFERENCE`` in the same round, None where that was not measured.
    """

    units: float
    peak_bytes: float
    seconds: float
    memory_ratio: float | None
    time_ratio: float | None


@dataclass(frozen=True)
class Row:
    """A system of the comparison, and its figures or why there are none."""

    system: str
    label: str
    figures: Figures | None
    missing: str = ""


def compared(results: Results) -> list[Row]:
    """Return one row for each system, in the order of the results."""
    return [_row(results, name, label) for name, label in results.labels.items()]


def _row(results: Results, name: str, label: str) -> Row:
    runs = _rounds(results, name)
    measured = [run for run in runs if run.outcome == "measured"]
    if not measured:
        return Row(name, label, None, missing=describe_outcome(runs[0]) if runs else "not run")
    reference = {run.round: run for run in _rounds(results, REFERENCE) if run.outcome == "measured"}
    pairs = [(run, reference[run.round]) for run in measured if run.round in reference]
    figures = Figures(
        units=median(units(run) for run in measured),
        peak_bytes=median(peak(run) for run in measured),
        seconds=median(step_seconds(run) for run in measured),
        memory_ratio=median(peak(run) / peak(other) for run, other in pairs) if pairs else None,
        time_ratio=median(step_seconds(run) / step_seconds(other) for run, other in pairs) if pairs else None,
    )
    return Row(name, label, figures)


def _rounds(results: Results, name: str) -> list[Run]:
    return [run for run in results.runs if run.experiment == "compare" and run.system == name]


def describe_outcome(run: Run) -> str:
    """Return in a few words why a run has no figures."""
    return run.outcome.replace("_", " ") + (f": {run.note}" if run.note else "")


def peak(run: Run) -> float:
    """Return a measured run's peak in bytes."""
    assert run.peak_bytes is not None
    return float(run.peak_bytes)


def units(run: Run) -> float:
    """Return a measured run's peak in units of tokens · dim · 4 bytes."""
    return peak(run) / run.shape.unit_bytes


def step_seconds(run: Run) -> float:
    """Return the median seconds of a measured run's steps."""
    return median(run.seconds)


EXPERIMENTS = {"seq_len": ("length", "compare"), "depth": ("depth",), "num_tokens": ("vocabulary",)}


def series(results: Results, axis: str, quantity: Callable[[Run], float]) -> dict[str, list[tuple[int, float]]]:
    """Return, per system, (value of the shape's ``axis``, median quantity) of its measured runs, ascending."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in results.labels}
    for run in results.runs:
        if run.outcome == "measured" and run.experiment in EXPERIMENTS[axis]:
            found[run.system].setdefault(getattr(run.shape, axis), []).append(quantity(run))
    return {
        name: [(value, median(quantities)) for value, quantities in sorted(points.items())]
        for name, points in found.items()
    }


def growth(points: Sequence[tuple[int, float]]) -> float | None:
    """Return the exponent p of quantity ∝ length^p, or None for fewer than three points.

    Fitted by least squares of the logarithms, from length ``GROWTH_FROM`` on.
    """
    fitted = [(length, quantity) for length, quantity in points if length >= GROWTH_FROM and quantity > 0]
    if len(fitted) < 3:
        return None
    lengths, quantities = np.log(np.array(fitted)).T
    return float(np.polyfit(lengths, quantities, 1)[0])
