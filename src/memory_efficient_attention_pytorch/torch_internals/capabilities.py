"""What this PyTorch can do beyond its public interface, asked by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Capability(Generic[T]):
    """A private part of PyTorch, or None if it is missing; looked up at the first call."""

    def __init__(self, name: str, find: Callable[[], T | None]) -> None:
        self.name, self._find, self._taken = name, find, False
        # Two plain attributes: torch.compile cannot trace the lock that cached_property takes under Python 3.11.
        self._found: T | None = None
        self._looked_up = False

    def __call__(self) -> T | None:
        if self._taken:
            return None
        if torch.compiler.is_compiling():
            return self._look_up()  # a graph that depended on what is noted here would have to be made again
        if not self._looked_up:
            self._found, self._looked_up = self._look_up(), True
        return self._found

    def _look_up(self) -> T | None:
        try:
            return self._find()
        except (AttributeError, ImportError, RuntimeError):
            return None


ALL: dict[str, Capability[Any]] = {}
"""Every capability by its name, those of modules of this room that have been imported."""


def capability(find: Callable[[], T | None]) -> Capability[T]:
    """Decorate a function that returns the part, or None, or fails to find it.

    To fail is to raise AttributeError, ImportError or RuntimeError.
    """
    made = Capability(find.__name__, find)
    assert made.name not in ALL, made.name
    ALL[made.name] = made
    return made


def operator(name: str, arguments: Sequence[str]) -> Callable[..., Any] | None:
    """The operator ``"namespace::name.overload"`` if its leading arguments are of these names; else None."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    names = [argument.name for argument in found._schema.arguments]
    return found if names[: len(arguments)] == list(arguments) else None


@contextmanager
def taken_away(name: str) -> Iterator[None]:
    """Treat the capability as missing inside the context, to test what serves instead."""
    part = ALL[name]
    before, part._taken = part._taken, True
    try:
        yield
    finally:
        part._taken = before
