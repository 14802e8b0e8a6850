"""Keys and values of tokens already seen, for generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import require


class KVCache:
    """What every attention layer keeps of the tokens seen so far; hand the same object to each forward call.

    ``length``: tokens seen. A layer with a window keeps only the keys that a later query can see. Buffers grow in
    doublings, so a layer holds at most ``2 · 2 · b · kv · d · min(length, window + n)`` elements, n being the tokens of
    the largest call (1 while generating). For inference only.

    Every layer extends once in a forward pass, which then advances. A pass that an exception cut short leaves layers
    that have seen unequal numbers of tokens; this is noticed, and such a cache is of no more use.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[nn.Module, _LayerCache] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers.values())

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor, left: int | None = None) -> tuple[Tensor, Tensor]:
        """Append ``(b, kv, n, ·)`` to the layer's keys and values and return all that the n new queries may see.

        left: how many keys before its own position a query of this layer sees (None: all). The tensors returned are
        views that hold until the next call.

        Raises:
            ValueError: gradients are enabled, another shape, dtype or device than before, or a layer out of step.
        """
        require(not torch.is_grad_enabled(), "cache", "torch.no_grad() or inference_mode()", "gradients enabled")
        mine = self._layers.get(layer)
        if mine is None:
            mine = self._layers[layer] = _LayerCache(k[:, :, :0], v[:, :, :0])
        require(
            mine.seen == self.length,
            "cache",
            f"every layer to have seen {self.length} tokens, by one call in each forward pass",
            f"one that has seen {mine.seen}",
        )
        return mine.extend(k, v, left)

    def advance(self, tokens: int) -> None:
        """To be called once per forward pass, after every layer has extended."""
        self.length += tokens


@dataclass
class _LayerCache:
    """Buffers ``(b, kv, capacity, ·)`` of which the first ``stored`` places are filled; ``seen``: tokens in all."""

    keys: Tensor
    values: Tensor
    stored: int = 0
    seen: int = 0

    def extend(self, k: Tensor, v: Tensor, left: int | None) -> tuple[Tensor, Tensor]:
        for new, buffer in ((k, self.keys), (v, self.values)):
            _check_alike(new, buffer)
        n = k.shape[2]
        kept = self.stored if left is None else min(self.stored, left)
        self.seen += n
        if left is not None and n > left:
            return self._replace(k, v, kept, left)
        if self.stored + n > self.keys.shape[2]:
            self.keys, self.values = (
                _roomy(buffer[:, :, self.stored - kept : self.stored], 2 * (kept + n))
                for buffer in (self.keys, self.values)
            )
            self.stored = kept
        end = self.stored + n
        self.keys[:, :, self.stored : end] = k
        self.values[:, :, self.stored : end] = v
        self.stored = end
        return self.keys[:, :, end - kept - n : end], self.values[:, :, end - kept - n : end]

    def _replace(self, k: Tensor, v: Tensor, kept: int, left: int) -> tuple[Tensor, Tensor]:
        """New tokens that fill the window by themselves: of these alone the last ``left`` are stored."""
        old = slice(self.stored - kept, self.stored)
        visible = tuple(
            torch.cat((buffer[:, :, old], new), dim=2) if kept else new
            for buffer, new in ((self.keys, k), (self.values, v))
        )
        start = k.shape[2] - left
        self.keys, self.values = (_roomy(new[:, :, start:], 2 * (left + 1)) for new in (k, v))
        self.stored = left
        return visible[0], visible[1]


def _roomy(content: Tensor, capacity: int) -> Tensor:
    """A buffer of ``capacity`` places, the first of which hold ``content``."""
    buffer = content.new_empty(*content.shape[:2], capacity, content.shape[3])
    buffer[:, :, : content.shape[2]] = content
    return buffer


def _check_alike(new: Tensor, buffer: Tensor) -> None:
    """One may follow the other: the same but for the number of tokens. A batch of 1 would otherwise be broadcast."""
    (b, kv, _, d), (rows, heads, _, width) = new.shape, buffer.shape
    same = (b, kv, d) == (rows, heads, width) and new.dtype == buffer.dtype and new.device == buffer.device
    require(
        same,
        "cache",
        f"batch, heads, width {rows, heads, width} in {buffer.dtype} on {buffer.device}, as before",
        f"{b, kv, d} in {new.dtype} on {new.device}",
    )
