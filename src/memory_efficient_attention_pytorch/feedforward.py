"""The feed-forward half of a block, and normalisation before a branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .errors import require, require_positive_int
from .pieces import Branch, apply_piecewise, chunked_branch, pieces_of


class FeedForward(nn.Module):
    """``Linear(dim, mult·dim) → GELU → Linear(mult·dim, dim)``, in ``chunks`` chunks of tokens.

    x ``(b, n, dim)`` → ``(b, n, dim)``. With more than one chunk the hidden values ``(b, n, mult·dim)`` never exist as
    a whole, in backward neither: x alone is kept and each chunk is computed once more there.
    """

    def __init__(self, dim: int, mult: int = 4, chunks: int = 1) -> None:
        super().__init__()
        for argument, value in (("dim", dim), ("mult", mult), ("chunks", chunks)):
            require_positive_int(argument, value)
        self.chunks = chunks
        self.net = nn.Sequential(nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim))

    def as_branch(self, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> Branch:
        require(not kwargs, "FeedForward", "no keyword arguments", ", ".join(kwargs))
        return chunked_branch(self.net, norm, chunks=self.chunks)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.chunks == 1 else apply_piecewise(self.as_branch({}), x)


class PreNorm(nn.Module):
    """``fn(LayerNorm(x))``; the norm belongs to fn's pieces where fn comes in pieces."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def as_branch(self, kwargs: Mapping[str, Any]) -> Branch:
        offer = pieces_of(self.fn)
        return Branch(self, [self], kwargs) if offer is None else offer(kwargs, norm=self.norm)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(self.norm(x), **kwargs)
