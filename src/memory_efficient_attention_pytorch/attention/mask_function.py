"""Evaluate masks that are functions of indices, one tile at a time: FlexAttention's ``mask_mod``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import require
from .broadcasting import canonical_broadcast

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(batch, head, query, key)``, integer tensors that broadcast → bool: True = may attend."""


class Place(NamedTuple):
    """A block of scores, by the indices of its sequences, query heads, queries and keys."""

    batch: slice
    heads: slice
    queries: slice
    keys: slice

    def indices(self, device: torch.device) -> list[Tensor]:
        """Return the indices, int64, as ``(b, 1, 1, 1)``, ``(1, h, 1, 1)``, ``(1, 1, i, 1)`` and ``(1, 1, 1, j)``."""
        ranges = (torch.arange(place.start, place.stop, device=device) for place in self)
        return [r.view([-1 if axis == own else 1 for axis in range(4)]) for own, r in enumerate(ranges)]


@dataclass(frozen=True)
class MaskFunction:
    """Holds a ``mask_mod`` with its classification of tiles, shared by calls and layers.

    Each tile is evaluated once and classified as empty, full or partial; the answer, one byte per tile, is kept in
    this object for later calls of the same sizes. A plain function passed as ``mask`` is classified in every call.

    Args:
        function: ``(batch, head, query, key) → bool``, element by element. Indices are int64 tensors that broadcast
            against each other; query and key are counted from 0, wherever causality aligns them. It may index tensors
            that it captures, which must not change while the object is in use.
        first_head: added to head indices, where a call has only some of a layer's heads.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import MaskFunction, dot_product_attention
        >>> prefix = MaskFunction(lambda batch, head, query, key: (query >= key) | (key < 64))
        >>> q = torch.randn(1, 4, 512, 32)
        >>> for _ in range(2):  # the second call knows which tiles are empty and which are full
        ...     out = dot_product_attention(q, q, q, mask=prefix)
    """

    function: MaskMod
    first_head: int = 0
    kept: dict[Hashable, bytes] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.function(batch, head + self.first_head if self.first_head else head, query, key)

    def of_heads(self, heads: slice) -> MaskFunction:
        """Return the same function for a call that has only these heads; the classification is shared."""
        return replace(self, first_head=self.first_head + heads.start)

    def at(self, indices: Sequence[Tensor]) -> Tensor:
        """Return the mask at these indices: bool, four dimensions, broadcastable with them.

        Raises ValueError if the function returns something else.
        """
        visible = self(*indices)
        came = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
        require(came == torch.bool, "mask function's output", "a tensor of dtype torch.bool (True = may attend)", came)
        b, h, n, m = torch.broadcast_shapes(*(index.shape for index in indices))
        return canonical_broadcast(visible, (b, h, n, m), "mask function's output")

    def looks_at(self, device: torch.device) -> tuple[bool, bool]:
        """Return whether the mask depends on the sequence, and whether it depends on the head."""
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
        b, h, _, _ = self.at((zero.expand(2, 1, 1, 1), zero.expand(1, 2, 1, 1), zero, zero)).shape
        return b > 1, h > 1


def mask_function(mask: MaskMod) -> MaskFunction:
    """Wrap a function; a :class:`MaskFunction` is returned unchanged, so that its classification is shared."""
    return mask if isinstance(mask, MaskFunction) else MaskFunction(mask)
