"""Plot a run's loss against tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_figure
from .tracking import read_metrics

UNITS = ((10**9, " B"), (10**6, " M"), (10**3, " k"), (1, ""))
MOST_DOTS = 50
TRAINING = {"label": "training batch", "color": "tab:blue", "linewidth": 1, "alpha": 0.6, "clip_on": False}
VALIDATION = {"label": "validation", "color": "tab:orange", "markersize": 4, "clip_on": False}
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}


def plot_losses(metrics: Path, path: Path) -> None:
    """Draw training and validation bits per byte against tokens from `metrics.jsonl` into a PNG."""
    write_figure(path, picture(read_metrics(metrics)))


def picture(records: Sequence[Mapping[str, Any]]) -> Any:
    """The picture of those records, as a figure of matplotlib's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train, validation = (
        [(record["tokens"], record[name]) for record in records if record.get(name) is not None]
        for name in ("bits_per_byte", "validation_bits_per_byte")
    )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    if train:
        alone = "o" if len(train) == 1 else ""
        axes.plot(*zip(*train, strict=True), **TRAINING, marker=alone)
    if validation:
        dots = "o" if len(validation) <= MOST_DOTS else ""
        axes.plot(*zip(*validation, strict=True), **VALIDATION, marker=dots)
        for point, side in {validation[-1]: "right", validation[0]: "left"}.items():
            axes.annotate(f"{point[1]:.2f}", point, (0, 7), textcoords="offset points", ha=side, bbox=BEHIND)
    points = [*train, *validation]
    most = max((tokens for tokens, _ in points), default=0)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("bits per byte")
    axes.set_xlim(0, max(1, 1.02 * most))
    axes.set_ylim(0, 1.1 * max((bits for _, bits in points), default=1))  # room above for what is written there
    unit, name = next((size, name) for size, name in UNITS if size <= max(1, most))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g}{name if value else ''}")
    axes.grid(alpha=0.3)
    if points:
        axes.legend(loc="lower left")  # where no loss is
    return figure
