"""Compute independent parts of a pass, each on one CPU thread whose operators are single-threaded.

Threads that share an operator wait for one another at its end. Parts of the size of a head need no such waits, keep
their data in one core's cache, and balance themselves when other processes keep some cores busy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
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
    """Call ``worker()`` once on each thread, and the function that it returns with part after part; without gradients.

    The caller's autocast, dispatch modes and context variables do not apply there, and parts run on any thread in any
    order: the result must not depend on that. An exception in a part is raised to the caller, and no further part is
    begun. The calling thread computes all parts if PyTorch has one thread, for fewer parts than threads, under a
    compiler or a dispatch mode, and without ``apart``. A dry run goes through a few of them there, and counts what all
    threads hold at once. alike: as in :func:`.dry_run.each`.
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
                left.clear()  # the last part was taken, or an exception was raised

    running: list[Future[None]] = []
    try:
        pool = _pool(threads, os.getpid())
        running += (pool.submit(run) for _ in range(threads))
        for done in running:
            done.result()
    finally:
        left.clear()
        wait(running)


def alone(function: Callable[[], T]) -> T:
    """Call a function on a new thread, which has no modes, with single-threaded operators."""
    with _default_kept(), ThreadPoolExecutor(1, initializer=_begin_alone) as thread:
        return thread.submit(function).result()


def _taken(left: list[T]) -> tuple[()] | tuple[T]:
    """Take the last remaining part, as a tuple of one, or return ()."""
    try:
        return (left.pop(),)
    except IndexError:
        return ()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Start a pool of single-threaded threads. process: part of the key, since a forked process has no threads."""
    pool, ready = ThreadPoolExecutor(threads, "attention", _begin_alone), Barrier(threads)
    with _default_kept():
        try:
            wait([pool.submit(ready.wait) for _ in range(threads)])
        finally:
            ready.abort()  # stop waiting for threads that could not be started
    return pool


def _begin_alone() -> None:
    torch.get_num_threads()  # the first call in a thread sets its number to the default, which would come later
    torch.set_num_threads(1)


@contextmanager
def _default_kept() -> Iterator[None]:
    """Restore the number with which later threads begin: the last one that any thread has set for itself."""
    threads = torch.get_num_threads()  # the first call in a thread takes the default, which must not be one set inside
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _watched() -> bool:
    """Return True under a compiler or a dispatch mode, which would not see operators on other threads."""
    modes = dispatch_modes()
    return torch.compiler.is_compiling() or modes is None or modes() > 0
