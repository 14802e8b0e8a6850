"""The interface between the engine and a dry run of it (``planner``).

A dry run sends fake tensors through the real code: nothing is computed, every allocation is seen. It runs only a few
iterations of a loop whose iterations are alike, records which module is at work, and makes the choices of the device
that is planned for. Outside a dry run these functions change nothing: loops run whole, devices are themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Alike = tuple[object, ...] | None

STAND_IN = torch.device("cpu", 0)
"""The device of tensors in a dry run for another device than the CPU: the CPU by another name; ``cpu`` is the host."""


class DryRun(Protocol):
    """The observer of a dry run. ``device_type`` and ``threads`` are those of the device planned for."""

    device_type: str
    threads: int

    def few_of(
        self, parts: Sequence[T], size: Callable[[T], float] | None, first: int, last: int, alike: Alike
    ) -> Iterable[T]:
        """Return a few of the parts, which stand for all; none if an equal loop has run already."""

    def working_on(self, owner: object) -> AbstractContextManager[None]:
        """Attribute the work inside to ``owner``: a parameter of the module that does it, or ``"loss"``."""

    def at_once(self, times: int) -> AbstractContextManager[None]:
        """Count what is allocated inside once for each of this many threads."""

    def keeps(self, tensor: Tensor) -> None:
        """Note that the running loop keeps this tensor, and one like it for every part that was skipped."""

    def exchanges(self, collective: str, arguments: tuple[Any, ...]) -> None:
        """Record a collective without peers; tensors that it would write stay unchanged."""


_current: ContextVar[DryRun | None] = ContextVar("dry_run", default=None)


def current() -> DryRun | None:
    """Return the active dry run, or None."""
    return None if torch.compiler.is_compiling() else _current.get()


@contextmanager
def watched_by(dry_run: DryRun) -> Iterator[None]:
    """Activate a dry run inside the context and in backward passes run there."""
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
    """Iterate over the parts of a loop that takes the same memory in every iteration.

    A dry run goes through the ``first`` few (accumulators are created in one and may widen in the next) and the
    ``last`` (which may be ragged). size: the work of a part, where parts differ. alike: a key of the loop's name and
    all that its memory depends on, tensors counting by their layouts; such a loop must leave no memory allocated, and a
    dry run goes through only one of those with the same key. None: the loop is like no other.
    """
    dry_run = current()
    return parts if dry_run is None else dry_run.few_of(parts, size, first, last, alike)


def working_on(owner: object) -> AbstractContextManager[None]:
    """Tell a dry run which module, or the loss, does the work inside."""
    dry_run = current()
    return nullcontext() if dry_run is None else dry_run.working_on(owner)


def at_once(times: int) -> AbstractContextManager[None]:
    """Tell a dry run that this many threads do the work inside."""
    dry_run = current()
    return nullcontext() if dry_run is None else dry_run.at_once(times)


def keeps(tensor: Tensor) -> None:
    """Tell a dry run that a tensor made in a part of a loop outlives the loop."""
    dry_run = current()
    if dry_run is not None:
        dry_run.keeps(tensor)


def device_type(device: torch.device) -> str:
    """Return the type of a tensor's device; in a dry run, that of the planned device where the CPU stands in for it."""
    dry_run = current()
    return device.type if dry_run is None or device != STAND_IN else dry_run.device_type


def num_threads() -> int:
    """Return the number of CPU threads of PyTorch's kernels; in a dry run that planned for."""
    dry_run = current()
    return torch.get_num_threads() if dry_run is None else dry_run.threads
