"""Plot a plan: live memory over the step, and what the peak consists of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..common.sizes import format_size
from ..planner import Plan

GIB, MIB = 2**30, 2**20
POINTS = 2000
COLOURS = ("#27498a", "#2f6fde", "#a9c7ee", "#00a2c7", "#b45f06", "#f1c232", "#6aa84f", "#d5a6bd", "#7f7f7f", "#c8c8c8")


def draw(plan: Plan, path: Path | str) -> Path:
    """Write the plot as PNG and return its path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = picture(plan)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})
    return partial.replace(path)


def picture(plan: Plan, size: tuple[float, float] = (11, 5)) -> Any:
    """The picture as a figure of matplotlib's, of ``size`` in inches and in the colours of its settings."""
    from matplotlib.figure import Figure

    unit, name = (GIB, "GiB") if plan.peak_bytes >= GIB else (MIB, "MiB")
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{format_size(plan.peak_bytes)} at the peak:\n{plan.peak.describe()}", fontsize=11)
    over_time, at_peak = figure.subplots(1, 2, width_ratios=(3, 1))
    _timeline(over_time, plan, unit, name)
    _peak(at_peak, plan, unit)
    return figure


def _timeline(axes: Any, plan: Plan, unit: int, name: str) -> None:
    rows, places = _thinned(plan)
    axes.stackplot(places, rows.T / unit, colors=COLOURS)  # the bars beside it are the legend
    phases = [operation.phase for operation in plan.timeline.operations]
    ink = axes.xaxis.label.get_color()
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(phases), 1) if "loss" not in (a, b) and a != b)]
    for start in starts:
        axes.axvline(start, color=ink, linewidth=0.6, alpha=0.5)
        axes.annotate(f" {phases[start]}", (start, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=9)
    if plan.budget is not None:
        axes.axhline(plan.budget / unit, color="#b00020", linestyle="--")
        axes.annotate(f" budget {format_size(plan.budget)}", (0, plan.budget / unit), va="bottom", color="#b00020")
    axes.plot(plan.timeline.peak, plan.peak_bytes / unit, ".", color=ink, markersize=7)
    axes.set_xlim(0, len(phases))
    axes.set_ylim(0)
    axes.set_xlabel("operations of a training step")
    axes.set_ylabel(name)
    axes.spines[["top", "right"]].set_visible(False)


def _peak(axes: Any, plan: Plan, unit: int) -> None:
    shares = list(plan.breakdown.items())
    values = [nbytes / unit for _, nbytes in shares]
    bars = axes.barh([name for name, _ in shares], values, color=COLOURS)
    axes.bar_label(bars, [format_size(nbytes) for _, nbytes in shares], padding=3, fontsize=8)
    axes.set_title("at the peak", fontsize=9)
    axes.set_xlim(0, 1.35 * max(values))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _thinned(plan: Plan) -> tuple[Any, Any]:
    """Return live bytes and indices of some operations: of each stretch the one with the most, so the peak is in."""
    totals = plan.timeline.totals
    size = max(1, len(totals) // POINTS)
    places = np.array([start + totals[start : start + size].argmax() for start in range(0, len(totals), size)])
    return plan.timeline.live[places], places
