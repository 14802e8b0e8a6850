"""One of several processes that run `mea train` together over gloo, in a directory that holds text.txt.

Each case of RUNS of that many processes leaves its run in the directory; what the refused ones of REFUSED print and
return is written to refused-WORLD-RANK.json, and what is chosen by free memory to memory-WORLD-RANK.json.
"""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from memory_efficient_attention_pytorch import cli
from memory_efficient_attention_pytorch.training import budget, runs
from memory_efficient_attention_pytorch.training.config import TrainConfig
from memory_efficient_attention_pytorch.training.runs import resume_run, start_run
from memory_efficient_attention_pytorch.training.tracking import Callback
from tests.processes import join, leave

# 21 tokens divide among neither two nor four processes, three windows of validation not among two groups.
COMMON: dict[str, Any] = {
    **{"dim": 16, "depth": 2, "heads": 4, "dim_head": 8, "seq_len": 21, "batch_size": 4, "accumulation": 2},
    **{"steps": 4, "warmup_steps": 2, "final_learning_rate": 1.0, "clip": 0.5, "device": "cpu", "keep": 9},
    **{"evaluate_every": 2, "evaluation_windows": 3, "sample_every": 2, "sample_tokens": 3, "checkpoint_every": 2},
    **{"head_chunks": 1, "ff_chunks": 1, "loss_chunk_size": 16, "keep_attention": False, "exact": False},
}
# Each case: the processes, what its model is, and how the work is divided among them.
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "context": (
        2,
        {"reversible": True, "dropout": 0.1, "window": 9, "keep_attention": True},
        {"context_parallel": 2},
    ),
    "data x context": (
        4,
        {"reversible": False, "kv_heads": 1, "positions": "learned"},
        {"context_parallel": 2, "batch_size": 2},
    ),
    "shard x data x context": (
        4,
        {"reversible": True, "tie_embeddings": True, "head_chunks": 2, "ff_chunks": 2, "positions": "alibi"},
        {"context_parallel": 2, "batch_size": 2, "shard": True},
    ),
    "shard x context, bf16": (
        4,
        {"reversible": True, "exact": True, "precision": "bf16"},
        {"context_parallel": 4, "shard": True},
    ),
}
RESUMED = "shard x data x context"
# Options, and what is said of them.
REFUSED: dict[str, tuple[list[str], str]] = {
    "does not divide": (["--context-parallel=3"], "context_parallel must divide the number of processes, which is 2"),
    "fp16": (["--context-parallel=2", "--precision=fp16"], "context_parallel goes with precision fp32 and bf16"),
    "the main process alone finds it": (["--context-parallel=2", "--data=nowhere"], "there is no file or directory"),
    "another engine": (["--context-parallel=2"], "accelerate is configured to use PARALLELISM_CONFIG"),
}


def config(directory: Path, case: str, *, divided: bool) -> TrainConfig:
    _, model, division = RUNS[case]
    options = COMMON | model | {"data": (str(directory / "text.txt"),)}
    return TrainConfig(**options | (division if divided else {}))


def joined(rank: int, world: int, directory: Path, name: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    if dist.is_initialized():  # what is refused early ends nothing
        dist.destroy_process_group()
    (directory / "stores" / name).mkdir(parents=True, exist_ok=True)
    join(rank, world, directory / "stores" / name)


def quiet(main: bool) -> Callback:
    return Callback()


def refuse(arguments: list[str]) -> dict[str, Any]:
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        status = cli.main(["train", "--device=cpu", *arguments])
    return {"status": status, "error": error.getvalue()}


def chosen_for_memory(rank: int, directory: Path) -> dict[str, Any]:
    """What is decided by free memory where the main process's device has most of it; the others' has 2 GiB."""
    budget.available_memory = lambda device: (2 if rank else 8) << 30
    common, found = config(directory, "context", divided=False), {}
    for name in ("auto", None):
        asked = common.updated({"reversible": None, "memory_budget": name})
        _, memory, words = runs._settle(Accelerator(cpu=True), asked, 256)
        found[str(name)] = words if memory is None else memory.budget - memory.before
    return found


def run_all(rank: int, world: int, directory: Path) -> None:
    # What torchrun would say; they meet in a file, not at an address.
    os.environ |= {f"{prefix}RANK": str(rank) for prefix in ("", "LOCAL_")} | {"OMP_NUM_THREADS": "1"}
    os.environ |= {f"{prefix}WORLD_SIZE": str(world) for prefix in ("", "LOCAL_")}
    os.chdir(directory)
    for case, (processes, *_) in RUNS.items():
        if processes == world:
            joined(rank, world, directory, case)
            start_run(config(directory, case, divided=True), directory / case, quiet)
    if RUNS[RESUMED][0] == world:
        half = config(directory, RESUMED, divided=True).updated({"steps": 2})
        joined(rank, world, directory, "half")
        start_run(half, directory / "half", quiet)
        joined(rank, world, directory, "resumed")
        resume_run(directory / "half", {"steps": 4}, quiet)
    else:
        cli._SECONDS_TO_SPEAK = 0.0  # the others need not wait for a launcher
        found = {}
        for case, (arguments, _) in REFUSED.items():
            joined(rank, world, directory, case)
            os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = str(case == "another engine")
            found[case] = refuse(arguments)
        (directory / f"refused-{world}-{rank}.json").write_text(json.dumps(found))
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "False"
        joined(rank, world, directory, "memory")
        (directory / f"memory-{world}-{rank}.json").write_text(json.dumps(chosen_for_memory(rank, directory)))
    joined(rank, world, directory, "end")
    leave()
