"""Handle tensors that broadcast to the scores ``(b, h, n, m)``, whole and in parts."""

from __future__ import annotations

from torch import Tensor

from ..common.errors import require

EVERYTHING = slice(0, None)


def narrow_broadcast(tensor: Tensor, *places: slice) -> Tensor:
    """Restrict ``tensor (b|1, h|1, n|1, m|1)`` to places along the first few dimensions, except where it broadcasts."""
    sizes = zip(places, tensor.shape, strict=False)
    return tensor[tuple(place if size > 1 else EVERYTHING for place, size in sizes)]


def canonical_broadcast(tensor: Tensor, shape: tuple[int, int, int, int], argument: str) -> Tensor:
    """Return ``tensor`` with leading dimensions of 1 added until it has four, checked against the scores' ``shape``.

    Raises ValueError, naming ``argument``, if it does not broadcast to ``shape``.
    """
    sizes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    fits = tensor.dim() <= 4 and all(size in (1, full) for size, full in sizes)
    expected = f"a shape broadcastable to (batch, heads, queries, keys) = {shape}"
    require(fits, argument, expected, tuple(tensor.shape))
    return tensor[(None,) * (4 - tensor.dim())]
