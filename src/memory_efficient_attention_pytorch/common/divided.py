"""The interface between layers and the division of tokens over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor


class Divided(Protocol):
    """A sequence of which this process holds some tokens. All processes must make the same calls in the same order."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence."""

    @property
    def local_tokens(self) -> int:
        """Tokens of each process, padding included."""

    def positions(self, device: torch.device) -> Tensor:
        """Return the positions of this process's tokens in the whole, int64 ``(local,)``; the last one for padding."""

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the whole sequence's tensor from each process's part of it, without gradient."""

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all processes, without gradient."""

    def largest(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes."""

    def same(self, number: int) -> int:
        """Return the first process's number."""

    def loss(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' parts of a loss; each process differentiates its own part."""

    def may_hold(self, h: int, kv: int) -> bool:
        """Return whether attention can be computed for a group of ``h`` query and ``kv`` key/value heads."""

    def way(self, within: Any, request: Any) -> Any:
        """Return how to compute attention over all tokens, given the way that computes tiles."""


_active: ContextVar[Divided | None] = ContextVar("divided", default=None)


def active() -> Divided | None:
    """Return the active division of tokens; None if this process holds all of them."""
    # Compiled code runs eagerly where tokens are divided, so None is right under a compiler.
    return None if torch.compiler.is_compiling() else _active.get()


def whole_tokens(tokens: int) -> int:
    """Return the number of tokens of the whole sequence, of which this process has ``tokens``."""
    divided = active()
    return tokens if divided is None or tokens != divided.local_tokens else divided.num_tokens


@contextmanager
def within(divided: Divided | None) -> Iterator[None]:
    """Activate a division of tokens inside the context."""
    token = _active.set(divided)
    try:
        yield
    finally:
        _active.reset(token)


def refuse_divided(who: str) -> None:
    """Raise if tokens are divided and ``who`` would mistake this process's tokens for all of them."""
    if active() is not None:
        reason = "its positions, labels and masks would be of this process's tokens alone"
        raise NotImplementedError(f"{who}: tokens divided over processes are not supported, {reason}")
