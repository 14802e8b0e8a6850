"""The interface between layers and whatever divides tokens over processes."""

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
        """Tokens of each process, with those that fill up."""

    def positions(self, device: torch.device) -> Tensor:
        """Where this process's tokens stand in the whole, int64 ``(local,)``; those that fill up at the last place."""

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence's tensor from each process's part of it, without gradient."""

    def sum(self, x: Tensor) -> Tensor:
        """Over all processes, without gradient."""

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over all processes."""

    def same(self, number: int) -> int:
        """Broadcast the first process's number."""

    def loss(self, part: Tensor) -> Tensor:
        """The sum of each process's part of a loss, of which each differentiates its own."""

    def may_hold(self, h: int, kv: int) -> bool:
        """Can attention be computed of so many query and key/value heads alone?"""

    def way(self, within: Any, request: Any) -> Any:
        """A way of computing attention over all tokens by one that computes tiles."""


_active: ContextVar[Divided | None] = ContextVar("divided", default=None)


def active() -> Divided | None:
    """The active division of tokens; None where this process holds all of them."""
    # What is compiled runs eagerly where tokens are divided, so a compiler never asks in vain.
    return None if torch.compiler.is_compiling() else _active.get()


def whole_tokens(tokens: int) -> int:
    """Those of the whole sequence, of which ``tokens`` are here."""
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
