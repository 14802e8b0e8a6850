"""Plot a comparison: memory and time against length and depth, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

from ..training.files import write_figure
from .results import Results, Run
from .summary import MIB, compared, peak, series, step_seconds
from .systems import REFERENCE, SYSTEMS

OURS = ("#08306b", "#00a2c7", "#2f6fde", "#7b9ff2", "#a9c7ee", "#54789c")
OTHERS = ("#7f7f7f", "#b45f06", "#e69138", "#f1c232", "#6aa84f", "#a64d79", "#674ea7", "#444444")
MEMORY, SECONDS = "memory above the model, MiB", "seconds a step"
MARKERS = "osD^vPX*<>hp"
MOST_TICKS = 12
FINEST_FIRST = (
    tuple(tenths / 10 for tenths in range(10, 100)),
    (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 5),
    (1,),
)
"""The first digits of what a logarithmic axis is labelled with."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Write all figures that have at least two points as PNG into ``folder`` and return their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    drawings: dict[str, Callable[[Any], bool]] = {
        "memory-and-time": lambda axes: _plane(axes, results),
        "memory-by-length": lambda axes: _lines(axes, results, "seq_len", _mib, "tokens", MEMORY),
        "time-by-length": lambda axes: _lines(axes, results, "seq_len", step_seconds, "tokens", SECONDS),
        "memory-by-depth": lambda axes: _lines(axes, results, "depth", _mib, "layers", MEMORY),
    }
    return [path for name, drawing in drawings.items() if (path := _save(drawing, folder / f"{name}.png"))]


def _save(drawing: Callable[[Any], bool], path: Path) -> Path | None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    if not drawing(axes):
        return None
    axes.grid(True, alpha=0.5, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Below, since beside the plot the names would take half of the picture.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return write_figure(path, figure)


def _mib(run: Run) -> float:
    return peak(run) / MIB


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the line style of each system in all figures: ours thick and blue, others thin and of other colours."""
    known = {system.name for system in SYSTEMS if system.ours}
    blues, greys = cycle(OURS), cycle(OTHERS)
    return {
        name: {"color": next(blues), "marker": marker, "linewidth": 2.4, "zorder": 3}
        if name in known
        else {"color": next(greys), "marker": marker, "linewidth": 1.3, "zorder": 2}
        for name, marker in zip(names, cycle(MARKERS), strict=False)
    }


def _lines(axes: Any, results: Results, axis: str, quantity: Callable[[Run], float], across: str, up: str) -> bool:
    """Draw a line per system, logarithmic over lengths, so that slopes are exponents. False: too few points."""
    lines = {name: points for name, points in series(results, axis, quantity).items() if points}
    values = sorted({value for points in lines.values() for value, _ in points})
    if len(values) < 2:
        return False
    style = styles(results.labels)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=results.labels[name], markersize=6, clip_on=False, **style[name])
    if axis == "seq_len":
        axes.set_xscale("log", base=2)
        _logarithmic(axes, "y")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()
    axes.set(xlabel=across, ylabel=up)
    return True


def _plane(axes: Any, results: Results) -> bool:
    """Draw memory against time, where lower left is better, with lines through the reference. False: too few points."""
    rows = [(row, row.figures) for row in compared(results) if row.figures is not None]
    if len(rows) < 2:
        return False
    style = styles(results.labels)
    for row, found in rows:
        memory = found.peak_bytes / MIB
        point = style[row.system] | {"linestyle": "none", "markersize": 9, "clip_on": False}
        axes.plot([found.seconds], [memory], label=row.label, **point)
        if row.system == REFERENCE:
            axes.axvline(found.seconds, color="#777777", linewidth=0.9, linestyle="--", zorder=1)
            axes.axhline(memory, color="#777777", linewidth=0.9, linestyle="--", zorder=1)
            axes.set_title(f"left of the dashed lines faster, below less memory than {row.label}", fontsize="medium")
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    axes.minorticks_off()
    axes.set(xlabel=SECONDS, ylabel=MEMORY)
    return True


def _logarithmic(axes: Any, name: str) -> None:
    """Make the axis ``name`` logarithmic: in plain numbers, not powers, and from where the data begin to their end."""
    low, high = getattr(axes, f"{name}axis").get_data_interval()
    ticks = round_numbers(low / 1.03, high * 1.03)
    axes.set(**{f"{name}scale": "log", f"{name}lim": (ticks[0], ticks[-1])})
    axes.set(**{f"{name}ticks": ticks, f"{name}ticklabels": [f"{tick:,g}" for tick in ticks]})


def round_numbers(low: float, high: float) -> list[float]:
    """Return at most ``MOST_TICKS`` round numbers for a logarithmic axis, with ``low`` and ``high`` between them."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    found: list[float] = []
    for digits in FINEST_FIRST:
        numbers = [float(f"{digit}e{exponent}") for exponent in exponents for digit in digits]
        first = max(i for i, number in enumerate(numbers) if number <= low)
        last = min(i for i, number in enumerate(numbers) if number >= high)
        found = numbers[first : max(last, first + 1) + 1]
        if len(found) <= MOST_TICKS:
            break
    return found
