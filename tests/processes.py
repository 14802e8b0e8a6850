"""A script run by several processes at once, each of which writes what it finds to one folder."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent


def run_processes(script: ModuleType, world: int, *arguments: object, strict: bool = True) -> None:
    """Run the script with its rank and the arguments, once for each rank; AssertionError if one of them fails.

    strict: warnings are errors.
    """
    command = [sys.executable, *(["-W", "error"] if strict else []), "-m", script.__name__]
    running = [
        subprocess.Popen([*command, *map(str, (rank, *arguments))], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(errors)


def join(rank: int, world: int, directory: Path) -> None:
    """In the script: a group of all, which nobody waits for longer than a minute, and one thread for each.

    The first return from here may come while others still connect, and leaving the group at once would end those.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    dist.barrier()


def leave() -> None:
    """At the script's end, when all is written: wait for the others, and end.

    Threads of gloo's groups may outlive the interpreter's objects, and C++ then ends the process with SIGABRT: it ends
    before that.
    """
    dist.barrier()
    os._exit(0)
