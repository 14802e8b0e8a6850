"""Keys and values of tokens already seen, for generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import require


class KVCache:
    """What every attention layer keeps of the tokens seen so far; hand the same object to each forward call.

    ``length``: tokens seen. A layer with a window keeps only the keys that a later query can see. Memory grows in
    doublings: at most twice ``layers · 2 · b · kv · min(length, window) · d`` elements. For inference only.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, _LayerCache] = {}

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor, left: int | None = None) -> tuple[Tensor, Tensor]:
        """Append ``(b, kv, n, ·)`` to the layer's keys and values and return all that the n new queries may see.

        left: how many keys before its own position a query of this layer sees (None: all).
        """
        require(not torch.is_grad_enabled(), "cache", "torch.no_grad() or inference_mode()", "gradients enabled")
        mine = self._layers.setdefault(id(layer), _LayerCache())
        return mine.extend(k, v, left)

    def advance(self, tokens: int) -> None:
        """To be called once per forward pass, after every layer has extended."""
        self.length += tokens


@dataclass
class _LayerCache:
    """Buffers ``(b, kv, capacity, ·)`` of which the first ``stored`` places are filled."""

    keys: Tensor | None = None
    values: Tensor | None = None
    stored: int = 0

    def extend(self, k: Tensor, v: Tensor, left: int | None) -> tuple[Tensor, Tensor]:
        visible = self.stored if left is None else min(self.stored, left)
        needed = visible + k.shape[2]
        if self.keys is None or self.values is None or self.stored + k.shape[2] > self.keys.shape[2]:
            self.keys, self.values = (
                self._make_room(old, new, visible, 2 * needed) for old, new in ((self.keys, k), (self.values, v))
            )
            self.stored = visible
        end = self.stored + k.shape[2]
        self.keys[:, :, self.stored : end] = k
        self.values[:, :, self.stored : end] = v
        self.stored = end
        return self.keys[:, :, end - needed : end], self.values[:, :, end - needed : end]

    def _make_room(self, buffer: Tensor | None, new: Tensor, visible: int, capacity: int) -> Tensor:
        """A buffer whose first places hold the ``visible`` last entries."""
        roomy = new.new_empty(*new.shape[:2], capacity, new.shape[3])
        if buffer is not None:
            require(
                buffer.shape[:2] == new.shape[:2],
                "cache",
                f"batch and heads {tuple(buffer.shape[:2])}",
                tuple(new.shape[:2]),
            )
            roomy[:, :, :visible] = buffer[:, :, self.stored - visible : self.stored]
        return roomy
