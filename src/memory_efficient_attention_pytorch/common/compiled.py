"""Keep torch.compile out of what must run as it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def eagerly(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Return ``function(*args, **kwargs)``; torch.compile runs it uncompiled, as one break of its graph.

    For what is differentiated by hand, whose repetition in backward must be what forward was, bit for bit and random
    number by random number, and for loops over parts whose number depends on lengths: a compiler would make a graph for
    each number.
    """
    if not torch.compiler.is_compiling():
        return function(*args, **kwargs)
    from .uncompiled import run  # which imports the compiler: it is there by now

    found: T = run(function, *args, **kwargs)
    return found
