"""Report a comparison as Markdown text and tables, for the terminal, the results' folder and the README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .results import Results, Run, describe_place
from .summary import GROWTH_FROM, MIB, Row, compared, describe_outcome, growth, peak, series, step_seconds, units
from .systems import REFERENCE

_RETURNED = "The allocator returns what is freed at once, from 64 KiB on."
_KEPT = "The allocator returns freed blocks of 4 MiB at once and may keep smaller ones, as in `mea train`."


def comparison(results: Results) -> str:
    """Return how it was measured, and the table of all systems at the compared shape."""
    return f"{method(results)}\n\n{comparison_table(results)}"


def comparison_table(results: Results) -> str:
    headings = ["", "memory, units", "memory, MiB", "seconds a step", "memory, relative", "time, relative"]
    return table(headings, [_cells(row) for row in compared(results)])


def method(results: Results) -> str:
    """Return a paragraph on what was run where, when and with which versions."""
    settings = results.settings
    shape, rounds = settings.base, settings.rounds
    allocator = _KEPT if settings.keep_freed else _RETURNED
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        f"One forward and backward, loss included, of a causal Transformer: {shape.batch_size} × "
        f"{shape.seq_len} tokens, dim {shape.dim}, {shape.depth} layers, {shape.heads} heads, feed-forward "
        f"×{shape.ff_mult}, vocabulary {shape.num_tokens}, fp32 unless a line says otherwise. Memory is the peak "
        f"above the built model and its gradients; a unit is tokens · dim · 4 bytes. {allocator} Each system in fresh "
        f"processes, in turn, {rounds} round{'s' if rounds > 1 else ''}: medians. Relative figures are medians of the "
        f"ratios to *{results.labels.get(REFERENCE, REFERENCE)}* in the same round. {describe_place(results.machine)}; "
        f"{versions}; {results.date[:10]}."
    )


def full(results: Results, figures: Sequence[str] = ()) -> str:
    """Return ``comparison``, figures, tables over length, depth and vocabulary, and what was left out and why."""
    parts = [comparison(results), *(f"![{Path(name).stem.replace('-', ' ')}]({name})" for name in figures)]
    sweeps: list[tuple[str, str, Callable[[Run], float], str]] = [
        ("Memory in MiB, by sequence length", "seq_len", lambda run: peak(run) / MIB, ".0f"),
        ("Seconds a step, by sequence length", "seq_len", step_seconds, ".3g"),
        ("Memory in units, by depth", "depth", units, ".1f"),
        ("Memory in units, by vocabulary", "num_tokens", units, ".1f"),
    ]
    for title, axis, quantity, digits in sweeps:
        points = series(results, axis, quantity)
        if any(points.values()):
            parts.append(f"**{title}**\n\n{_sweep_table(results, points, digits)}")
    parts.append(_growth_table(results))
    parts.append(_left_out(results))
    return "\n\n".join(part for part in parts if part)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up as text; the first is aligned left, the others right."""
    widths = [max(len(line[i]) for line in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headings), line(rule), *map(line, rows)])


def _cells(row: Row) -> list[str]:
    found = row.figures
    if found is None:
        return [row.label, row.missing.partition(":")[0], "", "", "", ""]
    ratios = [f"{ratio:.2f}×" if ratio is not None else "" for ratio in (found.memory_ratio, found.time_ratio)]
    return [row.label, f"{found.units:.1f}", f"{found.peak_bytes / MIB:.0f}", f"{found.seconds:.3g}", *ratios]


def _sweep_table(results: Results, points: dict[str, list[tuple[int, float]]], digits: str) -> str:
    values = sorted({value for line in points.values() for value, _ in line})
    rows = []
    for name, label in results.labels.items():
        at = dict(points[name])
        if at:
            rows.append([label, *(f"{at[value]:{digits}}" if value in at else "–" for value in values)])
    return table(["", *map(str, values)], rows)


def _growth_table(results: Results) -> str:
    memory, seconds = series(results, "seq_len", peak), series(results, "seq_len", step_seconds)
    rows = []
    for name, label in results.labels.items():
        exponents = growth(memory[name]), growth(seconds[name])
        if None not in exponents:
            rows.append([label, *(f"{exponent:.2f}" for exponent in exponents)])
    if not rows:
        return ""
    title = f"**Growth with the sequence length n from {GROWTH_FROM} tokens on: the exponent p of nᵖ, fitted**"
    return f"{title}\n\n{table(['', 'memory', 'time'], rows)}"


def _left_out(results: Results) -> str:
    reasons: dict[str, None] = {}
    for run in results.runs:
        if run.outcome != "measured":
            reasons[f"- {results.labels[run.system]} at {run.shape.describe()}: {describe_outcome(run)}"] = None
    return "**Left out**\n\n" + "\n".join(reasons) if reasons else ""
