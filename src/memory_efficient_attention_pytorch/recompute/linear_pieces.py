"""Hand-written backward passes of the linear layers in a branch: gradients are summed where they belong, in place.

Through autograd every piece would make its own gradient of every weight before it is added to the others'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.dry_run import each
from ..common.gradients import accumulator, left_to_add
from ..common.products import add_product
from .pieces import Add, Index, vector_jacobian_product

# Normed values and the projections' cotangents are held for one slab of tokens at a time: this part of all of them,
# but not so few that the matrix products suffer.
SLAB_PART, SLAB_MINIMUM = 1 / 16, 512


def slabs(x: Tensor) -> Iterable[Index]:
    """Slices of the first two dimensions of ``(b, n, …)``, each contiguous: a slab of tokens."""
    return each(list(_slabs(x)))


def _slabs(x: Tensor) -> Iterator[Index]:
    b, n = x.shape[:2]
    size = max(SLAB_MINIMUM, math.ceil(b * n * SLAB_PART))
    if n > size and b:
        for i in range(b):
            for start in range(0, n, size):
                yield slice(i, i + 1), slice(start, min(start + size, n))
        return
    rows = max(1, size // max(n, 1))
    for start in range(0, max(b, 1), rows):
        yield slice(start, min(start + rows, b)), slice(None)


class Gradients:
    """Where the gradients of one backward pass gather: of leaves in totals, of x through ``add_gradient``."""

    def __init__(self, leaves: Sequence[Tensor], needed: Sequence[bool], add_gradient: Add | None) -> None:
        self._places = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._needed, self._leaves = needed, leaves
        self._totals: list[Tensor | None] = [None] * len(leaves)
        self._add_gradient = add_gradient

    @property
    def wanted(self) -> list[Tensor]:
        """The leaves that need a gradient."""
        return [leaf for leaf, need in zip(self._leaves, self._needed, strict=True) if need]

    @property
    def totals(self) -> list[Tensor | None]:
        """What backward returns for each leaf, once all is gathered: what its ``.grad`` has not yet, in its dtype."""
        pairs = zip(self._leaves, self._totals, strict=True)
        return [None if total is None else left_to_add(leaf, total) for leaf, total in pairs]

    def total(self, leaf: Tensor) -> Tensor | None:
        """The accumulator of a leaf (fp32 at least; its ``.grad`` if it can be), None where no gradient is wanted."""
        place = self._places[id(leaf)]
        if self._needed[place] and self._totals[place] is None:
            self._totals[place] = accumulator(leaf)
        return self._totals[place]

    def add(self, leaf: Tensor, grad: Tensor | None, place: Any = ...) -> None:
        """Add to a leaf's gradient, at ``place``."""
        total = None if grad is None else self.total(leaf)
        if total is not None and grad is not None:
            total[place].add_(grad)

    def add_product(self, weight: Tensor, upstream: Tensor, values: Tensor, place: Any = ...) -> None:
        """Add ``upstreamᵀ values``, over tokens, to the gradient of a linear layer's weight, at ``place``."""
        total = self.total(weight)
        if total is not None:
            add_product(total[place], upstream.flatten(0, -2), values.flatten(0, -2))

    def through_norm(
        self, index: Index, norm: nn.Module | None, piece: Tensor, normed: Tensor, upstream: Tensor
    ) -> None:
        """From the gradient of ``normed = norm(piece)`` to those of x at ``index`` and of the norm's parameters."""
        upstream = upstream.to(normed.dtype)
        if norm is not None:
            parameters = [p for p in norm.parameters() if self._needed[self._places[id(p)]]]
            found, *of_norm = vector_jacobian_product(normed, [piece, *parameters], upstream)
            for parameter, grad in zip(parameters, of_norm, strict=True):
                self.add(parameter, grad)
            assert found is not None
            upstream = found
        if self._add_gradient is not None:
            self._add_gradient(index, upstream)


def normed_piece(x: Tensor, index: Index, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """A slice of x and, with its graph, the norm of it (itself without a norm)."""
    piece = x[index].detach().requires_grad_(norm is not None)
    with torch.enable_grad():
        return piece, piece if norm is None else norm(piece)


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """What a linear layer computes in: autocast's dtype where it is on, else the tokens' own."""
    kind = tokens.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and tokens.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tokens.dtype
