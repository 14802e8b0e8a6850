"""Write the benchmark's figures into README.md and docs/benchmarks.md, between the markers, from a results file.

    python benchmarks/readme.py [--check] [RESULTS_JSON]

Without a file: the newest under benchmarks/results/, quick runs aside. Where other kinds of machine were measured in
the same way, the newest table of each follows, by processor and device. With --check nothing is written; the exit
status is 1 if a figure in the text is not the one in the results. What `python benchmarks/huggingface.py` wrote stands
in the README between markers of its own.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from markers import between_markers, rewrite

from memory_efficient_attention_pytorch.benchmarking.report import comparison, comparison_table, full
from memory_efficient_attention_pytorch.benchmarking.results import Results, describe_place

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
MARKERS = "<!-- benchmark: generated from the results, do not edit -->", "<!-- benchmark: end -->"
OF_MODELS = tuple(marker.replace("benchmark:", "benchmark of transformers' models:") for marker in MARKERS)
"""Around the figures of models of transformers, where a document has these."""


def newest_results(folder: Path) -> Path:
    """The results file with the latest date under ``folder``; ValueError if there is none."""
    files = results_files(folder)
    if not files:
        raise ValueError(f"no results under {folder}; run mea bench first")
    return max(files, key=lambda path: Results.load(path).date)


def results_files(folder: Path) -> list[Path]:
    """All results files under ``folder`` but those of quick runs."""
    return [path for path in folder.glob("20*/results.json") if not path.parent.name.endswith("-quick")]


def results_elsewhere(results: Results, folder: Path) -> list[Results]:
    """The newest results of every other kind of machine, of the same shape and allocator, the newest first."""
    found: dict[tuple[str, str | None], Results] = {}
    measured = sorted(map(Results.load, results_files(folder)), key=lambda each: each.date)
    processors = [each.machine["processor"] for each in (*measured, results)]
    for other in measured:
        alike = (other.settings.base, other.settings.keep_freed) == (results.settings.base, results.settings.keep_freed)
        # Earlier files have the processor's name without its family: that may be the same one.
        known = not any(name.startswith(f"{other.machine['processor']},") for name in processors)
        if alike and known and _kind(other) != _kind(results):
            found[_kind(other)] = other
    return sorted(found.values(), key=lambda each: each.date, reverse=True)


def _kind(results: Results) -> tuple[str, str | None]:
    return results.machine["processor"], results.machine.get("gpu")


def with_tables(report: str, results: Results, elsewhere: Sequence[Results]) -> str:
    """A report on results, with the tables of others after the comparison that it begins with."""
    own = comparison(results)
    tables = (f"The same on {describe_place(r.machine)}; {r.date[:10]}:\n\n{comparison_table(r)}" for r in elsewhere)
    return "\n\n".join([own, *tables]) + report.removeprefix(own)


def blocks(results_file: Path) -> list[tuple[Path, tuple[str, str], str]]:
    """Documents, markers and what belongs between them: the table and the plane in the README, all in the docs."""
    results = Results.load(results_file)
    elsewhere = results_elsewhere(results, ROOT / "benchmarks" / "results")

    def figures(document: Path, pattern: str = "*.png") -> list[str]:
        found = sorted(results_file.parent.glob(pattern))
        return [Path(os.path.relpath(path, document.parent)).as_posix() for path in found]

    plane = [f"![memory and time]({path})" for path in figures(README, "memory-and-time.png")]
    found = [
        (README, MARKERS, with_tables("\n\n".join([comparison(results), *plane]), results, elsewhere)),
        (DOCS, MARKERS, with_tables(full(results, figures(DOCS)), results, elsewhere)),
    ]
    if OF_MODELS[0] in README.read_text():
        models = ROOT / "benchmarks" / "results" / "huggingface" / "huggingface.md"
        found.append((README, OF_MODELS, models.read_text().strip("\n")))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS_JSON")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the text is out of date")
    args = parser.parse_args(arguments)
    file = (args.results or newest_results(ROOT / "benchmarks" / "results")).resolve()
    stale = False
    for path, markers, block in blocks(file):
        if args.check:
            current = between_markers(path, markers) == block
            stale = stale or not current
            print(f"{path.relative_to(ROOT)}: {'as in the results' if current else 'out of date'}")
        else:
            changed = rewrite(path, block, markers)
            print(f"{path.relative_to(ROOT)}: {'rewritten' if changed else 'unchanged'} from {file}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
