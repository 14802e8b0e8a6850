"""Plot a run's loss against tokens."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tracking import read_metrics


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw training and validation bits per byte against tokens from `metrics.jsonl` into a PNG."""
    temporary = picture.with_name(f".{picture.name}.partial")
    temporary.write_bytes(drawn(read_metrics(metrics)))
    temporary.replace(picture)


def drawn(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a plot of the records, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(r["tokens"], r["bits_per_byte"]) for r in records if "bits_per_byte" in r]
    validation = [(r["tokens"], r["validation_bits_per_byte"]) for r in records if "validation_bits_per_byte" in r]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, alpha=0.6, label="training batch")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
        for point, side in ((validation[0], "left"), (validation[-1], "right")):
            axes.annotate(f"{point[1]:.2f}", point, textcoords="offset points", xytext=(0, 7), ha=side)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    png = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(png)
    return png.getvalue()
