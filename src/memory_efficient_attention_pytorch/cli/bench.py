"""Measure the memory and speed of a training step on this machine: our model in several settings beside alternatives
in plain PyTorch, in turn, each in fresh processes. Writes results.json, report.md and figures.

  mea bench --quick           tiny shapes, to check that everything works
  mea bench --list            list the systems
  mea bench --systems ours sdpa-checkpoint --lengths --depths --vocabularies
                              only these two, only at the compared shape
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..benchmarking.schedule import QUICK, Settings
from ..benchmarking.shape import SHAPE_FIELDS, Shape
from ..common.errors import MissingExtraError, brought_by
from .parser import add_options, given_options
from .terminal import fitted

if TYPE_CHECKING:
    from ..benchmarking.results import Results
    from ..benchmarking.runner import Progress
    from ..benchmarking.systems import System

_PROGRESS = "{:<9}{:<24}{:>7}{:>7}{:>7}  {:<16}{:>8}"
_METHOD = ("device", "threads", "rounds", "repeats", "step_limit", "keep_freed")
_SWEEPS = ("lengths", "depths", "vocabularies", "sweep_seq_len")
DEFAULT_OUTPUT = Path("benchmarks") / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mea bench [options]"
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round instead of the defaults")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="only these systems; ratios need sdpa-checkpoint")
    parser.add_argument("--list", action="store_true", help="print the systems and exit")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder for the results (a new one in {DEFAULT_OUTPUT})"
    )
    add_options(parser, Settings, _METHOD)
    add_options(parser.add_argument_group("the compared shape"), Shape, SHAPE_FIELDS)
    add_options(parser.add_argument_group("other shapes, one run each; without a value: none"), Settings, _SWEEPS)


def run(args: argparse.Namespace) -> int:
    from ..benchmarking.systems import find_systems

    return measure(args, find_systems(args.systems))


def measure(args: argparse.Namespace, systems: Sequence[System]) -> int:
    """Compare these systems as the options say and report, or list them; return the exit status."""
    from ..benchmarking.runner import compare

    if args.list:
        width = max(len(system.name) for system in systems)
        print(*(f"{system.name:<{width}}  {system.label}" for system in systems), sep="\n")
        return 0
    settings = _settings(args)
    output = args.output or _new_folder(settings.device, args.quick)
    file = output / "results.json"
    print(_PROGRESS.format("run", "system", "tokens", "layers", "vocab.", f"{'units':>6}{'seconds':>10}", "left"))
    try:
        results = compare(settings, systems, file, _print_progress)
    except KeyboardInterrupt:
        print(f"stopped; the measurements so far are in {file}", file=sys.stderr)
        raise
    _report(results, output)
    return 1 if any(run.outcome == "failed" for run in results.runs) else 0


def _settings(args: argparse.Namespace) -> Settings:
    start = QUICK if args.quick else Settings()
    base = replace(start.base, **given_options(args, SHAPE_FIELDS))
    return replace(start, base=base, **given_options(args, _METHOD + _SWEEPS))


def _new_folder(device: str, quick: bool) -> Path:
    import datetime

    if not DEFAULT_OUTPUT.parent.is_dir():
        raise ValueError(f"--output: expected a folder for the results, since there is no {DEFAULT_OUTPUT.parent} here")
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d-%H%M")
    return DEFAULT_OUTPUT / f"{stamp}-{device.replace(':', '')}{'-quick' if quick else ''}"


def _print_progress(progress: Progress) -> None:
    from ..benchmarking.summary import describe_outcome, step_seconds, units

    run = progress.run
    shape, left = run.shape, "" if progress.seconds_left is None else _duration(progress.seconds_left)
    measured = run.outcome == "measured"
    found = f"{units(run):6.1f}{step_seconds(run):10.3f}" if measured else describe_outcome(run)
    done, sizes = f"[{progress.done}/{progress.total}]", (shape.seq_len, shape.depth, shape.num_tokens)
    print(_PROGRESS.format(done, run.system, *sizes, found, left).rstrip(), flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _report(results: Results, output: Path) -> None:
    from ..benchmarking.figures import draw
    from ..benchmarking.report import full, method
    from ..training.files import write_atomically

    try:
        with brought_by("train"):
            figures = [path.name for path in draw(results, output)]
    except MissingExtraError as error:
        figures = []
        print(f"no figures: {error}", file=sys.stderr)
    write_atomically(output / "report.md", full(results, figures) + "\n")
    print(fitted(f"\n{method(results)}"))
    _print_comparison(results)
    print(f"\nresults, report and figures: {output}")


def _print_comparison(results: Results) -> None:
    """The report's table in the width of a terminal: without lines between columns, and two rows of headings."""
    from ..benchmarking.summary import MIB, compared

    line = "{:<44}{:>7}{:>8}{:>9}{:>6}{:>6}"
    print("\n" + line.format("", "memory,", "memory,", "seconds", "rel.", "rel."))
    print(line.format("", "units", "MiB", "a step", "mem.", "time"))
    for row in compared(results):
        found = row.figures
        if found is None:
            print(f"{row.label:<44}{row.missing.partition(':')[0]}")
            continue
        ratios = ("" if ratio is None else f"{ratio:.2f}" for ratio in (found.memory_ratio, found.time_ratio))
        sizes = f"{found.units:.1f}", f"{found.peak_bytes / MIB:,.0f}", f"{found.seconds:.3g}"
        print(line.format(row.label, *sizes, *ratios))
