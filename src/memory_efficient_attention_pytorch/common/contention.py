"""Have OpenMP's threads sleep while they wait, as long as this process has to share its cores with other work.

A thread that has done its part of an operator spins until the others have done theirs, and then until the next operator
begins. On idle cores that is fastest. Where another process wants the core, the spinning thread keeps the one that it
waits for from running, and small operators take several times as long. GNU's OpenMP, which PyTorch has under Linux,
lets threads spin 300,000 turns, but 100 if there are more OpenMP threads than CPUs (`GOMP_SPINCOUNT
<https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html>`_). So a guest, a thread that starts OpenMP threads of
its own and lets them sleep, is what makes the others sleep; it leaves when the cores are free again. How long threads
spin changes no result.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import cache
from threading import Event, Lock, Thread

import torch

from ..torch_internals.openmp import set_own_threads
from .dry_run import current

INTERVAL = 0.25  # seconds between two readings
SHARE = 0.15  # of the time, that some thread waits for a core: up to 0.02 on idle cores, 0.28 to 0.45 beside a busy one
QUIET = 4  # readings below it, after which the guest leaves
_THREADS = "/proc/self/task"


def watch() -> None:
    """Look, a few times a second, whether threads of this process wait for cores. Cheap enough for every operator.

    Does nothing in a dry run, where PyTorch has one thread, or fewer than half as many as there are CPUs, where the
    system does not tell (Linux does) or another OpenMP than GNU's is loaded, where address space is limited, of which
    threads reserve some, and if ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` say how threads should wait.
    """
    if not torch.compiler.is_compiling() and current() is None and torch.get_num_threads() > 1:
        _watch(os.getpid()).look()


class Watch:
    """The readings of one process, and its guest while it is ``crowded``."""

    def __init__(self) -> None:
        self._possible, self._reading = _possible(), Lock()
        self._read = time.perf_counter(), waited()
        self._guest: Thread | None = None

    @property
    def crowded(self) -> bool:
        return self._guest is not None and self._guest.is_alive()

    def look(self) -> None:
        """Read again if the last reading is old enough, and invite a guest if a thread has waited."""
        early = time.perf_counter() - self._read[0] < INTERVAL
        if not self._possible or early or self.crowded or not self._reading.acquire(blocking=False):
            return
        try:
            if self._share() > SHARE and _is_unlimited():
                self._invite(torch.get_num_threads(), len(os.sched_getaffinity(os.getpid())))
        except (OSError, RuntimeError):  # no thread can be started
            self._possible = False
        finally:
            self._reading.release()

    def _share(self) -> float:
        """Return the share of the time since the last reading for which the thread that waited most has waited."""
        now, waits = time.perf_counter(), waited()
        (since, before), self._read = self._read, (now, waits)
        longest = max((seconds - before.get(thread, seconds) for thread, seconds in waits.items()), default=0.0)
        return longest / max(now - since, INTERVAL / 2)

    def _invite(self, threads: int, cpus: int) -> None:
        if cpus > 2 * threads:
            return  # the system finds free ones
        begun = Event()
        # The guest is one of its OpenMP threads, and PyTorch's are there already: together one more than CPUs.
        number = max(2, cpus + 2 - threads)
        # OpenMP ends the process if it cannot start one. Twice as many, since ended ones may count a moment longer.
        _start_threads(2 * number)
        guest = Thread(target=self._stay, args=(number, begun), name="contention", daemon=True)
        guest.start()
        self._guest = guest
        begun.wait()

    def _stay(self, threads: int, begun: Event) -> None:
        try:
            torch.get_num_threads()  # the first call in a thread sets its number to the default
            set_own = set_own_threads()
            assert set_own is not None
            set_own(threads)
            self._possible = torch.get_num_threads() == threads  # else PyTorch's OpenMP is another one
            torch.zeros(2**17, device="cpu").add_(1)  # large enough to be shared, which starts the threads
        finally:
            begun.set()
        quiet = 0
        while self._possible and quiet < QUIET:
            time.sleep(INTERVAL)
            quiet = 0 if self._share() > SHARE else quiet + 1


@cache
def _watch(process: int) -> Watch:
    """Return the process's watch; a forked process has none of its parent's threads."""
    return Watch()


def waited() -> dict[str, float]:
    """Return for each thread of this process the seconds that it could have run and had no core; {} if unknown."""
    found = {}
    with suppress(OSError):  # another system
        for thread in os.listdir(_THREADS):
            with suppress(OSError), open(f"{_THREADS}/{thread}/schedstat") as file:  # unless it has just ended
                found[thread] = int(file.read().split()[1]) / 1e9
    return found


def _start_threads(number: int) -> None:
    """Start and end this many threads, which exist at the same time. Raises RuntimeError if the system allows fewer."""
    release, started = Event(), []
    try:
        for _ in range(number):
            thread = Thread(target=release.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        release.set()
        for thread in started:
            thread.join()


def _possible() -> bool:
    told = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return not told and bool(waited()) and set_own_threads() is not None


def _is_unlimited() -> bool:
    from resource import RLIM_INFINITY, RLIMIT_AS, getrlimit  # not under Windows, which does not come here

    return getrlimit(RLIMIT_AS)[0] == RLIM_INFINITY
