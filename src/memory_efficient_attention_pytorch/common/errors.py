"""Argument checks shared by every room: one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class MissingExtraError(ModuleNotFoundError, ValueError):
    """Raised when a feature needs an optional dependency that is not installed."""


def require(condition: bool, argument: str, expected: str, got: Any) -> None:
    """Raise ``ValueError("{argument}: expected {expected}, got {got}")`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def require_positive_int(argument: str, value: Any) -> None:
    """Raise unless ``value`` is an integer of at least 1 (booleans are refused)."""
    positive = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(positive, argument, "a positive integer", repr(value))


def require_probability(argument: str, value: Any) -> None:
    """Raise unless ``0 <= value < 1``."""
    require(isinstance(value, int | float) and 0 <= value < 1, argument, "a number in [0, 1)", repr(value))


@contextmanager
def brought_by(extra: str) -> Iterator[None]:
    """Turn a missing package into :class:`MissingExtraError`, which names the ``extra`` that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        command = f"pip install 'memory-efficient-attention-pytorch[{extra}]'"
        raise MissingExtraError(f"{package} is not installed: {command}", name=error.name) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion to append to an error, `` (did you mean X?)``, or "" if no known name resembles ``name``."""
    import difflib

    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""
