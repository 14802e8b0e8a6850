"""One sequence over several processes: the memory of each, and the time, beside one process.

    python benchmarks/context_parallel.py [--tokens 16384] [--processes 2 4] [--output FOLDER]

A causal Transformer (dim 512, 2 layers, 8 heads, fp32), as constructed and with everything stored (reversible=False):
one forward and backward with its loss, each process fresh and with one thread. Memory is the peak above the built model
and its gradients (the resident set's high-water mark), after a short step that loads what is used first, of the process
with the most. Seconds are of that one step, in which the allocator returns every block at once. A first line is one
process with as many threads as two processes have. Writes context-parallel.json and context-parallel.md to FOLDER.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak, zero_grads
from memory_efficient_attention_pytorch.benchmarking.report import table
from memory_efficient_attention_pytorch.benchmarking.results import describe_provenance, provenance
from memory_efficient_attention_pytorch.distributed import ContextParallel
from memory_efficient_attention_pytorch.training.files import write_atomically

ROOT = Path(__file__).resolve().parent
MODEL: dict[str, Any] = {"num_tokens": 256, "dim": 512, "depth": 2, "heads": 8, "causal": True}
SETTINGS: dict[str, dict[str, Any]] = {"as constructed": {}, "everything stored": {"reversible": False}}
METHODS = ("ring", "all_to_all", "auto")
WARM_UP = 1024


def build(rank: int, world: int, method: str, store: str, tokens: int, settings: dict[str, Any]) -> Callable[[], None]:
    """One process's model with its gradients, and its step; the target of ``measure_peak``."""
    torch.manual_seed(0)
    model = Transformer(max_seq_len=tokens, **MODEL, **settings)
    ids = torch.randint(model.num_tokens, (1, tokens))
    context: ContextParallel | None = None
    if world > 1:
        place = {"rank": rank, "world_size": world, "timeout": timedelta(minutes=10)}
        dist.init_process_group("gloo", store=dist.FileStore(store, world), **place)
        context = ContextParallel(dist.group.WORLD, method=method)

    def step(length: int = tokens) -> None:
        x = ids[:, :length]
        if context is None:
            model(x, labels=x.roll(-1, 1)).backward()
            return
        own, labels = context.shard(x, x.roll(-1, 1))
        with context:
            loss = model(own, labels=labels)
        loss.backward()
        context.reduce_gradients(model)

    step(min(WARM_UP, tokens))
    zero_grads(model)
    return step


def measure(label: str, world: int, method: str, threads: int, tokens: int) -> dict[str, Any]:
    arguments = {"world": world, "method": method, "tokens": tokens, "settings": SETTINGS[label]}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(world) as pool:
        waiting = [
            pool.submit(
                measure_peak, f"{__file__}:build", arguments | {"rank": rank, "store": f"{folder}/s"}, threads=threads
            )
            for rank in range(world)
        ]
        found = [each.result() for each in waiting]
    most, seconds = max(each.peak_bytes for each in found), max(each.seconds for each in found)
    run = {
        "row": label,
        "processes": world,
        "threads": threads,
        "method": method if world > 1 else "",
        "tokens": tokens,
    }
    return run | {"peak_bytes": most, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="besides one")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "context-parallel", metavar="FOLDER")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for label in SETTINGS:
        rows = [(1, "", 2), (1, "", 1), *((p, method, 1) for p in args.processes for method in METHODS)]
        for world, method, threads in rows:
            runs.append(measure(label, world, method, threads, args.tokens))
            alone = next((r for r in runs if r["row"] == label and (r["processes"], r["threads"]) == (1, 1)), runs[-1])
            runs[-1]["share"] = runs[-1]["peak_bytes"] * world / alone["peak_bytes"]
            print(runs[-1], flush=True)
        runs[-len(rows)]["share"] = runs[-len(rows)]["peak_bytes"] / runs[1 - len(rows)]["peak_bytes"]
    titles = ["", "processes × threads", "way", "MiB of each", "× processes ÷ one's", "seconds, once"]
    cells = [
        [r["row"], f"{r['processes']} × {r['threads']}", r["method"], f"{r['peak_bytes'] / 2**20:.0f}"]
        + [f"{r['share']:.2f}", f"{r['seconds']:.1f}"]
        for r in runs
    ]
    record = provenance() | {"runs": runs}
    text = f"{table(titles, cells)}\n\n{args.tokens:,} tokens; {describe_provenance(record)}\n"
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / "context-parallel.json", json.dumps(record, indent=1) + "\n")
    write_atomically(args.output / "context-parallel.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
