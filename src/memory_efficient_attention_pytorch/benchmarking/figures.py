"""Plot a comparison: memory and time against length and depth, and against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

from .results import Results, Run
from .summary import compared, peak, series, step_seconds
from .systems import REFERENCE, SYSTEMS

MIB = 1024**2
OURS = ("#08306b", "#00a2c7", "#2f6fde", "#7b9ff2", "#a9c7ee", "#54789c")
OTHERS = ("#7f7f7f", "#b45f06", "#e69138", "#f1c232", "#6aa84f", "#a64d79", "#674ea7", "#444444")
MEMORY, SECONDS = "memory above the model, MiB", "seconds a step"
MARKERS = "osD^vPX*<>hp"


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

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    if not drawing(axes):
        return None
    axes.grid(True, which="both", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})
    return partial.replace(path)


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
        axes.plot(*zip(*points, strict=True), label=results.labels[name], markersize=6, **style[name])
    if axis == "seq_len":
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    _describe(axes, across, up)
    return True


def _plane(axes: Any, results: Results) -> bool:
    """Draw memory against time, where lower left is better, with lines through the reference. False: too few points."""
    rows = [(row, row.figures) for row in compared(results) if row.figures is not None]
    if len(rows) < 2:
        return False
    style = styles(results.labels)
    for row, found in rows:
        memory = found.peak_bytes / MIB
        point = style[row.system] | {"linestyle": "none", "markersize": 9}
        axes.plot([found.seconds], [memory], label=row.label, **point)
        if row.system == REFERENCE:
            axes.axvline(found.seconds, color="#bbbbbb", linewidth=0.8, zorder=1)
            axes.axhline(memory, color="#bbbbbb", linewidth=0.8, zorder=1)
    for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        scale("log")
        _plain_numbers(axis)
    _describe(axes, SECONDS, MEMORY)
    return True


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis 1, 2, 5, 10, ..., not in powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _describe(axes: Any, across: str, up: str) -> None:
    axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
