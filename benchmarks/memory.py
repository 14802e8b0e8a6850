"""Measure whether a step's memory is the same whatever the model, and a step of a million tokens, in fresh processes.

    python benchmarks/memory.py [--million] [--output FOLDER]

A row is one forward and backward of the Transformer with its loss: the peak above the built model and its gradients
(the resident set's high-water mark) in units of tokens · dim · 4 bytes, after a short step that loads what is used
first. The models of the first table differ from the base, 8192 tokens at dim 512 as constructed, in what a row says.
With --million only the second: 1,048,576 tokens with a window. Writes memory.json and memory.md (million.…) to FOLDER.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak, zero_grads
from memory_efficient_attention_pytorch.benchmarking.report import table
from memory_efficient_attention_pytorch.benchmarking.results import describe_provenance, provenance
from memory_efficient_attention_pytorch.training.files import write_atomically

ROOT = Path(__file__).resolve().parent
BASE = {"seq_len": 8192, "num_tokens": 256, "dim": 512, "depth": 2, "heads": 8}
ROWS: dict[str, dict[str, Any]] = {
    "base: 2 layers, 8 heads, feed-forward ×4, vocabulary 256": {},
    "8 layers": {"depth": 8},
    "24 layers": {"depth": 24},
    "16 heads of 32": {"heads": 16, "dim_head": 32},
    "16 heads of 64": {"heads": 16},
    "1 key/value head": {"kv_heads": 1},
    "feed-forward ×16": {"ff_mult": 16},
    "vocabulary 32000": {"num_tokens": 32000},
    "bf16 autocast, exact": {"autocast": True, "exact": True},
    "rotary positions": {"positions": "rotary"},
    "window of 1024": {"window": 1024},
    "groups of one head": {"head_chunks": 8},
    "4 groups of heads, 16 chunks of tokens": {"head_chunks": 4, "ff_chunks": 16},
    "attention and feed-forward whole": {"head_chunks": 1, "ff_chunks": 1},
}
MILLION: dict[str, dict[str, Any]] = {
    f"{n:,} tokens": {"seq_len": n, "dim": 256, "heads": 4, "depth": 2, "window": 512, "head_chunks": 2}
    for n in (2**17, 2**20)
}
WARM_UP = 1024


def build(seq_len: int, autocast: bool = False, **settings: Any) -> Callable[[], None]:
    """The model with its gradients, and its step; the target of ``measure_peak``."""
    torch.manual_seed(0)
    model = Transformer(max_seq_len=seq_len, causal=True, **settings)
    tokens = torch.randint(model.num_tokens, (1, seq_len))

    def step(length: int = seq_len) -> None:
        x = tokens[:, :length]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x, labels=x.roll(-1, 1))
        loss.backward()

    step(min(WARM_UP, seq_len))
    zero_grads(model)
    return step


def measure(label: str, changes: dict[str, Any]) -> dict[str, Any]:
    arguments = BASE | changes
    found = measure_peak(f"{__file__}:build", arguments)
    peak = found.peak_bytes
    unit = arguments["seq_len"] * arguments["dim"] * 4
    return {"row": label, "settings": arguments, "peak_bytes": peak, "units": peak / unit, "seconds": found.seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", action="store_true", help="the second table only")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "memory", metavar="FOLDER")
    args = parser.parse_args()
    name, rows = ("million", MILLION) if args.million else ("memory", ROWS)
    found = []
    for label, changes in rows.items():
        found.append(measure(label, changes))
        print(f"{label:<60}{found[-1]['units']:6.2f} units {found[-1]['seconds']:8.1f} s", flush=True)
    cells = [
        [run["row"], f"{run['units']:.2f}", f"{run['peak_bytes'] / 2**20:.0f}", f"{run['seconds']:.1f}"]
        for run in found
    ]
    # Seconds of one step each are no comparison: the models of the first table are for its memory alone.
    columns = 4 if args.million else 3
    text = table(["", "units", "MiB", "seconds, once"][:columns], [row[:columns] for row in cells])
    args.output.mkdir(parents=True, exist_ok=True)
    record = provenance() | {"runs": found}
    write_atomically(args.output / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_atomically(args.output / f"{name}.md", f"{text}\n\n{describe_provenance(record)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
