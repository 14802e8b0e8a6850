"""Independent parts of a pass, each computed by one CPU thread whose operators are single-threaded.

Threads that share an operator wait for one another at its end. Parts of the size of a head have no such ends, keep what
they work on in one core's cache, and where another process is busy the free core takes more of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

from ..torch_internals.tensors import dispatch_modes
from .dry_run import Alike, at_once, each, num_threads

T = TypeVar("T")


def in_threads(
    parts: Sequence[T], worker: Callable[[], Callable[[T], None]], *, apart: bool = True, alike: Alike = None
) -> None:
    """Call ``worker()`` once on each thread, and what it returns with part after part; without gradients.

    Neither autocast nor dispatch modes nor context variables of the caller are at work there, nor is it said which
    thread computes a part, or in which order: none of it may matter. An exception of a part is the caller's, and no
    further part is begun then. The calling thread computes all of them where it has but one thread, for fewer parts
    than threads, under a compiler or a dispatch mode, and if they are not to be computed ``apart``; a dry run goes
    through a few of them there, and counts what the threads hold at once. alike: as in :func:`.dry_run.each`.
    """
    threads = num_threads()
    if not apart or len(parts) < threads:
        threads = 1
    if threads == 1 or _watched():
        with at_once(threads):
            compute = worker()
            for part in each(parts, alike=alike):
                compute(part)
        return
    left, inference = list(reversed(parts)), torch.is_inference_mode_enabled()

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            try:
                compute = worker()
                while part := _taken(left):
                    compute(*part)
            finally:
                left.clear()  # the last was taken, or something was raised

    running: list[Future[None]] = []
    try:
        pool = _pool(threads, os.getpid())
        running += (pool.submit(run) for _ in range(threads))
        for done in running:
            done.result()
    finally:
        left.clear()
        wait(running)


def _taken(left: list[T]) -> tuple[()] | tuple[T]:
    """The last that is left, if any is."""
    try:
        return (left.pop(),)
    except IndexError:
        return ()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Single-threaded threads, all of them started. process: after a fork there are none of them any more."""
    pool, ready = ThreadPoolExecutor(threads, "attention", _begin_alone), Barrier(threads)
    try:
        wait([pool.submit(ready.wait) for _ in range(threads)])
    finally:
        ready.abort()  # nobody waits for a thread that could not be started
        torch.set_num_threads(threads)  # what threads to come begin with: the last one to set its own decides that
    return pool


def _begin_alone() -> None:
    torch.get_num_threads()  # the first question to a thread gives it the number of others, which would come later
    torch.set_num_threads(1)


def _watched() -> bool:
    """True where somebody sees what this thread computes, and would not see it on another."""
    modes = dispatch_modes()
    return torch.compiler.is_compiling() or modes is None or modes() > 0
