"""Write the benchmark's figures into README.md and docs/benchmarks.md, between the markers, from a results file.

    python benchmarks/readme.py [--check] [RESULTS_JSON]

Without a file: the newest under benchmarks/results/, quick runs aside. With --check nothing is written; the exit
status is 1 if a figure in the text is not the one in the results.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from memory_efficient_attention_pytorch.benchmarking.report import between_markers, comparison, full, rewrite
from memory_efficient_attention_pytorch.benchmarking.results import Results

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"


def newest_results(folder: Path) -> Path:
    """The results file with the latest date under ``folder``; ValueError if there is none."""
    files = [path for path in folder.glob("20*/results.json") if not path.parent.name.endswith("-quick")]
    if not files:
        raise ValueError(f"no results under {folder}; run mea bench first")
    return max(files, key=lambda path: Results.load(path).date)


def blocks(results_file: Path) -> dict[Path, str]:
    """What belongs between the markers of each file: the table and the plane in the README, all in the docs."""
    results = Results.load(results_file)

    def figures(document: Path, pattern: str = "*.png") -> list[str]:
        found = sorted(results_file.parent.glob(pattern))
        return [Path(os.path.relpath(path, document.parent)).as_posix() for path in found]

    plane = [f"![memory and time]({path})" for path in figures(README, "memory-and-time.png")]
    return {README: "\n\n".join([comparison(results), *plane]), DOCS: full(results, figures(DOCS))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS_JSON")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the text is out of date")
    args = parser.parse_args(arguments)
    file = (args.results or newest_results(ROOT / "benchmarks" / "results")).resolve()
    stale = False
    for path, block in blocks(file).items():
        if args.check:
            current = between_markers(path) == block
            stale = stale or not current
            print(f"{path.relative_to(ROOT)}: {'as in the results' if current else 'out of date'}")
        else:
            changed = rewrite(path, block)
            print(f"{path.relative_to(ROOT)}: {'rewritten' if changed else 'unchanged'} from {file}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
