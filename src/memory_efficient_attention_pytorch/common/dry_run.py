"""What the engine asks of a dry run, where one is at work around it (``planner``).

A dry run sends fake tensors through the real code: nothing is computed, every allocation is seen. It need not go
through every part of a loop whose parts are alike, it wants to know whose work is at hand, and it decides as another
device would. Outside of a dry run all of this is what it seems: the whole loop, no note taken, the device itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Alike = tuple[object, ...] | None

STAND_IN = torch.device("cpu", 0)
"""Where tensors lie in a dry run for a device other than the CPU: the CPU by another name, ``cpu`` being the host."""


class DryRun(Protocol):
    """Who watches a dry run. ``device_type`` and ``threads``: of the device that is planned for."""

    device_type: str
    threads: int

    def few_of(
        self, parts: Sequence[T], size: Callable[[T], float] | None, first: int, last: int, alike: Alike
    ) -> Iterable[T]:
        """A few of the parts, each standing for some more; none where another loop has done the same."""

    def working_on(self, owner: object) -> AbstractContextManager[None]:
        """Inside, the work is ``owner``'s: a parameter of the module that does it, or ``"loss"``."""

    def at_once(self, times: int) -> AbstractContextManager[None]:
        """Inside, what is made is made by as many threads, each for itself."""

    def keeps(self, tensor: Tensor) -> None:
        """The loop at work keeps this tensor, as it does one like it for every part that was left out."""


_current: ContextVar[DryRun | None] = ContextVar("dry_run", default=None)


def current() -> DryRun | None:
    """The dry run at work, if there is one."""
    return None if torch.compiler.is_compiling() else _current.get()


@contextmanager
def watched_by(dry_run: DryRun) -> Iterator[None]:
    """Inside, and in the backward passes run there, this is the dry run at work."""
    token = _current.set(dry_run)
    try:
        yield
    finally:
        _current.reset(token)


def each(
    parts: Sequence[T],
    *,
    size: Callable[[T], float] | None = None,
    first: int = 2,
    last: int = 1,
    alike: Alike = None,
) -> Iterable[T]:
    """The parts of a loop that takes the same memory in every iteration.

    A dry run goes through the ``first`` few (accumulators come into being in one and may widen in the next) and the
    ``last`` (which may be ragged). size: the work of a part, where they differ. alike: the name of the loop and all
    that its memory depends on, of tensors their layouts; it leaves none behind that it took. Then a dry run goes
    through one such loop for all. None: no other is alike.
    """
    dry_run = current()
    return parts if dry_run is None else dry_run.few_of(parts, size, first, last, alike)


def working_on(owner: object) -> AbstractContextManager[None]:
    """Tell a dry run whose work is done inside."""
    dry_run = current()
    return nullcontext() if dry_run is None else dry_run.working_on(owner)


def at_once(times: int) -> AbstractContextManager[None]:
    """Tell a dry run that as many threads do what is done inside."""
    dry_run = current()
    return nullcontext() if dry_run is None else dry_run.at_once(times)


def keeps(tensor: Tensor) -> None:
    """Tell a dry run that a tensor made in a part of a loop outlives the loop."""
    dry_run = current()
    if dry_run is not None:
        dry_run.keeps(tensor)


def device_type(device: torch.device) -> str:
    """The type of a tensor's device; in a dry run that of the device planned for, where another stands in for it."""
    dry_run = current()
    return device.type if dry_run is None or device != STAND_IN else dry_run.device_type


def num_threads() -> int:
    """CPU threads of PyTorch's kernels."""
    dry_run = current()
    return torch.get_num_threads() if dry_run is None else dry_run.threads
