"""Predictions of the planner for one of several processes beside what real ones take.

  python benchmarks/planner_processes.py               each of 2 and 4 processes that share parameters, tokens or both
  python benchmarks/planner_processes.py --only 0 5    some of them; nothing is written

A measurement is that of planner_accuracy.py, of the process that takes most.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.benchmarking.measure import Measurement, measure_peak
from memory_efficient_attention_pytorch.distributed import ContextParallel
from memory_efficient_attention_pytorch.planner import plan

if TYPE_CHECKING:  # beside this file, which measuring processes load from elsewhere
    import planner_accuracy as accuracy

# Ring and exchange of heads are chosen as by "auto".
PROCESSES: list[dict[str, Any]] = [
    {"shards": 2},
    {"shards": 2, "dim": 512, "heads": 8, "depth": 3},
    {"shards": 4, "depth": 8, "seq_len": 2048},
    {"shards": 4, "num_tokens": 8000, "reversible": False},
    {"shards": 2, "num_tokens": 16000, "tie_embeddings": True, "positions": "rotary"},
    {"context": 2, "seq_len": 8192},
    {"context": 2, "seq_len": 8192, "window": 512},
    {"context": 2, "seq_len": 8192, "kv_heads": 2, "positions": "rotary"},
    {"context": 2, "seq_len": 8192, "reversible": False, "head_chunks": 1},
    {"context": 4, "seq_len": 16384},
    {"context": 4, "seq_len": 16384, "kv_heads": 1},
    {"context": 4, "seq_len": 12000, "window": 1024, "positions": "rotary"},
    {"context": 4, "seq_len": 16384, "keep_attention": True, "ff_chunks": 8},
    {"context": 2, "shards": 2, "seq_len": 8192},
    {"context": 4, "shards": 4, "seq_len": 16384, "dim": 512, "heads": 8, "depth": 2},
    {"context": 4, "shards": 4, "seq_len": 16384, "kv_heads": 1, "positions": "rotary"},
]


def build(how: dict[str, Any], keywords: dict[str, Any], rank: int, store: str) -> Callable[[], None]:
    """One process of a group and its step, how: of so many tokens and processes; the target of ``measure_peak``."""
    world = max(how["shards"], how["context"])
    found = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=found, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    torch.manual_seed(0)
    model = Transformer(max_seq_len=how["seq_len"], **keywords)
    if how["shards"] > 1:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    context = ContextParallel(dist.group.WORLD, averaged=how["shards"] > 1) if how["context"] > 1 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(keywords["num_tokens"], (how["batch_size"], how["seq_len"]))

    def step(length: int) -> None:
        x = tokens[:, :length]
        if context is None:
            model(x, labels=x).backward()
        else:
            x, labels = context.shard(x, x)
            with context:
                loss = model(x, labels=labels)
            loss.backward()
            if not context.averaged:
                context.reduce_gradients(model)
        optimizer.step()

    step(64)  # loads what PyTorch loads on first use, and makes gradients and the optimizer's state
    dist.barrier()
    return lambda: step(how["seq_len"])


def compare(config: dict[str, Any]) -> accuracy.Row:
    import planner_accuracy as accuracy

    keywords = {"shards": 1, "context": 1, **accuracy.BASE, **config}
    how = {name: keywords.pop(name) for name in ("batch_size", "seq_len", "shards", "context")}
    made = plan(keywords, device="cpu", threads=1, **how)
    before = sum(made.timeline.breakdown(0)[part] for part in accuracy.STATE)
    world = max(how["shards"], how["context"])
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(world) as pool:

        def measured(rank: int) -> Measurement:
            arguments = {"how": how, "keywords": keywords, "rank": rank, "store": str(Path(directory, "store"))}
            return measure_peak(f"{__file__}:build", arguments, threads=1)

        every = list(pool.map(measured, range(world)))
    return accuracy.Row(config, made.peak_bytes, before + max(m.peak_bytes for m in every), every[0].seconds)


def main() -> None:
    import planner_accuracy as accuracy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of configurations; nothing is written")
    arguments = parser.parse_args()
    rows = accuracy.compare_all(PROCESSES, compare, arguments.only)
    if arguments.only:
        print(*accuracy.table(rows), sep="\n")
        return
    head = (
        "# What the planner predicted for one of several processes and what was measured",
        "",
        f"Made by `python benchmarks/planner_processes.py` on {accuracy.MACHINE}, one thread for each process.",
        "The figures are the peak of a training step with parameters, gradients and optimizer state, of the one that",
        "takes most, over gloo. `shards`: parameters divided by FSDP2, block by block. `context`: tokens divided by",
        "ContextParallel, the way chosen by itself.",
        "",
    )
    accuracy.write("processes.md", *head, *accuracy.table(rows))


if __name__ == "__main__":
    main()
