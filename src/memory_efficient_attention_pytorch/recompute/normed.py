"""Normalise slices of a tensor on demand, never the whole; shared by hand-written branches.

Under autograd every piece would allocate its own gradient of every weight before adding it to the others'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .by_hand import reason_against
from .pieces import Index, Repetition

# Normed values and the projections' cotangents are held for one slab of tokens at a time: this part of all of them,
# but not so few that the matrix products suffer.
SLAB_PART, SLAB_MINIMUM = 1 / 16, 512


def slabs(x: Tensor) -> Sequence[Index]:
    """Return slices of the first two dimensions of ``(b, n, …)``, each a contiguous slab of tokens."""
    b, n = x.shape[:2]
    size = max(SLAB_MINIMUM, math.ceil(b * n * SLAB_PART))
    if n > size and b:
        starts = range(0, n, size)
        return [(slice(i, i + 1), slice(start, min(start + size, n))) for i in range(b) for start in starts]
    rows = max(1, size // max(n, 1))
    return [(slice(start, min(start + rows, b)), slice(None)) for start in range(0, max(b, 1), rows)]


class Normed:
    """Computes ``norm(x)``, or x without a norm, a slice at a time, forward and backward.

    norm: computes each token's values from that token alone (see :func:`is_norm_of_tokens`).
    """

    def __init__(self, x: Tensor, norm: nn.Module | None = None) -> None:
        self.x, self.norm = x, norm

    def at(self, index: Index) -> Tensor:
        """Return the normalised slice ``index``, for a forward pass."""
        return self.x[index] if self.norm is None else self.norm(self.x[index])

    def with_graph(self, index: Index) -> Tensor:
        """Return the normalised slice ``index``, with :meth:`backward` to be called next."""
        self._piece = self._value = self.x[index].detach()
        if self.norm is not None:
            with torch.enable_grad():
                self._value = self.norm(self._piece.requires_grad_())
        return self._value.detach()

    def passes_on(self, again: Repetition) -> bool:
        """Return whether the gradient of the normalised values is used: by the norm's parameters or for x."""
        return self.norm is not None or again.add_gradient is not None

    def backward(self, index: Index, upstream: Tensor, again: Repetition) -> None:
        """Backpropagate the slice's gradient to the norm's parameters and to x."""
        piece, value = self._piece, self._value
        del self._piece, self._value
        gradient: Tensor | None = upstream.to(value.dtype)
        if self.norm is not None:
            (gradient,) = again.sums.backward(value, upstream.to(value.dtype), [piece])
        if again.add_gradient is not None and gradient is not None:
            again.add_gradient(index, gradient)


def is_norm_of_tokens(norm: nn.Module) -> bool:
    """Return True for a plain norm over the last dimension, which can be computed for some tokens at a time."""
    known = reason_against(norm, nn.LayerNorm, nn.RMSNorm) is None
    return known and len(norm.normalized_shape) == 1  # type: ignore[arg-type]
