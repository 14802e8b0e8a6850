"""Have OpenMP's threads sleep while they wait, as long as this process has to share its cores with other work.

A thread that has done its part of an operator spins until the others have done theirs, and then until the next operator
begins. On idle cores that is fastest. Where another process wants the core, the spinning thread keeps the one that it
waits for from running, and small operators take several times as long. GNU's OpenMP, which PyTorch has under Linux,
lets threads spin 300,000 turns, but 100 if there are more OpenMP threads than CPUs (`GOMP_SPINCOUNT
<https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html>`_). So one thread more, which has OpenMP threads of its
own and lets all of them sleep, is what makes the others sleep; it ends when the cores are free again. How long threads
spin changes no result.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from threading import Event, Lock, Thread

import torch

from .dry_run import current
from .threads import default_kept

INTERVAL = 0.25  # seconds between two readings
SHARE = 0.15  # of the time, that some thread waits for a core: 0.01 to 0.05 on idle cores, 0.3 to 0.5 beside a busy one
_THREADS = Path("/proc/self/task")


def watch() -> None:
    """Look, a few times a second, whether threads of this process wait for cores. Cheap enough for every operator.

    Does nothing in a dry run, where the system does not tell (Linux does), where PyTorch has one thread, where address
    space is limited, of which threads reserve some, and if ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` say how threads
    should wait.
    """
    if not torch.compiler.is_compiling() and current() is None and torch.get_num_threads() > 1:
        _watch(os.getpid()).look()


class Watch:
    """The readings of one process, and the thread that makes the others sleep while ``crowded``."""

    def __init__(self) -> None:
        told = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
        self._possible, self._reading = not told and bool(waited()), Lock()
        self._read, self._waited = time.perf_counter(), waited()
        self._leave: Event | None = None

    @property
    def crowded(self) -> bool:
        return self._leave is not None

    def look(self) -> None:
        """Read again if the last reading is old enough, and begin or end."""
        if not self._possible or time.perf_counter() - self._read < INTERVAL or not self._reading.acquire(False):
            return
        try:
            now, new = time.perf_counter(), waited()
            longest = max((time - self._waited.get(thread, time) for thread, time in new.items()), default=0)
            crowded = longest > SHARE * (now - self._read)
            self._read, self._waited = now, new
            if crowded and self._leave is None:
                self._leave = _crowd() if _unlimited() else None
            elif not crowded and self._leave is not None:
                self._leave.set()
                self._leave = None
        finally:
            self._reading.release()


@cache
def _watch(process: int) -> Watch:
    """Return the process's watch; a forked process has none of its parent's threads."""
    return Watch()


def waited() -> dict[str, float]:
    """Return for each thread of this process the seconds that it could have run and had no core; {} if unknown."""
    found = {}
    for thread in _THREADS.iterdir() if _THREADS.is_dir() else ():
        try:
            found[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
        except OSError:  # the thread has ended, or the system does not count
            continue
    return found


def _unlimited() -> bool:
    from resource import RLIM_INFINITY, RLIMIT_AS, getrlimit  # not under Windows, which does not come here

    return getrlimit(RLIMIT_AS)[0] == RLIM_INFINITY


def _crowd() -> Event:
    """Start a thread with so many OpenMP threads that there are more than CPUs. They end when the event is set."""
    begun, leave = Event(), Event()
    threads = max(2, len(os.sched_getaffinity(0)) + 2 - torch.get_num_threads())

    def sleep() -> None:
        try:
            torch.get_num_threads()  # the first call in a thread sets its number to the default
            torch.set_num_threads(threads)
            torch.zeros(2**17).add_(1)  # large enough to be shared, which starts the threads
        finally:
            begun.set()
        leave.wait()

    with default_kept():
        Thread(target=sleep, name="contention", daemon=True).start()
        begun.wait()
    return leave
