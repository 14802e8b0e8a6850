"""Plot a plan: live memory over the step, and what the peak consists of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..common.sizes import format_size
from ..planner import Plan
from ..training.files import write_figure

GIB, MIB = 2**30, 2**20
POINTS = 2000
RED = "#b00020"
COLOURS = ("#27498a", "#2f6fde", "#a9c7ee", "#00a2c7", "#b45f06", "#f1c232", "#6aa84f", "#d5a6bd", "#7f7f7f", "#c8c8c8")


def draw(plan: Plan, path: Path | str) -> Path:
    """Write the plot as PNG and return its path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return write_figure(Path(path), picture(plan))


def picture(plan: Plan, size: tuple[float, float] = (11, 5)) -> Any:
    """The picture as a figure of matplotlib's, of ``size`` in inches and in the colours of its settings."""
    from matplotlib.figure import Figure

    unit, name = (GIB, "GiB") if plan.peak_bytes >= GIB else (MIB, "MiB")
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{format_size(plan.peak_bytes)} at the peak:\n{plan.peak.describe()}", fontsize=11)
    over_time, at_peak = figure.subplots(1, 2, width_ratios=(3, 1))
    _timeline(over_time, plan, unit, f"live bytes, {name}")
    _peak(at_peak, plan, unit)
    return figure


def _timeline(axes: Any, plan: Plan, unit: int, label: str) -> None:
    rows, places = _thinned(plan)
    axes.stackplot(places, rows.T / unit, colors=COLOURS)  # the bars beside it are the legend
    phases = [operation.phase for operation in plan.timeline.operations]
    ink = axes.xaxis.label.get_color()
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(phases), 1) if "loss" not in (a, b) and a != b)]
    for start in starts:
        axes.axvline(start, color=ink, linewidth=0.6, alpha=0.5)
        # A name that begins near the right edge ends there: beyond it, it would take the plot's room.
        late = start > 0.85 * len(phases)
        named, where = (phases[start], len(phases)) if late else (f" {phases[start]}", start)
        side = "right" if late else "left"
        axes.annotate(named, (where, 1), xycoords=("data", "axes fraction"), va="bottom", ha=side, fontsize=9)
    if plan.budget is not None:
        axes.axhline(plan.budget / unit, color=RED, linestyle="--")
        behind = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 1.5}
        place = (0.01 * len(phases), plan.budget / unit)
        axes.annotate(
            f"budget {format_size(plan.budget)}", place, (0, 4), textcoords="offset points", color=RED, bbox=behind
        )
    axes.plot(plan.timeline.peak, plan.peak_bytes / unit, ".", color=ink, markersize=7)
    axes.set_xlim(0, len(phases))
    axes.set_ylim(0)
    training = "backward" in phases
    axes.set_xlabel(f"operations of {'a training step' if training else 'a prompt and a new token'}, in order")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _peak(axes: Any, plan: Plan, unit: int) -> None:
    """A bar for each category that is live at some time; those which are not at the peak tell their colour, too."""
    shown = np.flatnonzero(plan.timeline.live.any(axis=0)).tolist()
    names, sizes = zip(*plan.breakdown.items(), strict=True)
    colours = [COLOURS[i] for i in shown]
    values = [sizes[i] / unit for i in shown]
    bars = axes.barh([names[i] for i in shown], values, color=colours)
    axes.bar_label(bars, [format_size(sizes[i]) for i in shown], padding=3, fontsize=8)
    places = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    axes.scatter([-0.06] * len(shown), range(len(shown)), s=40, c=colours, marker="s", **places)
    axes.tick_params(axis="y", length=0, pad=16)
    axes.set_title("at the peak", fontsize=9, loc="left")
    axes.set_xlim(0, 1.35 * max(values))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _thinned(plan: Plan) -> tuple[Any, Any]:
    """Return live bytes and indices of some operations: of each stretch the one with the most, so the peak is in."""
    totals = plan.timeline.totals
    size = max(1, len(totals) // POINTS)
    places = np.array([start + totals[start : start + size].argmax() for start in range(0, len(totals), size)])
    return plan.timeline.live[places], places
