"""The cache of keys and values of earlier tokens, for generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import require, require_positive_int


class KVCache:
    """Holds keys and values of the tokens seen so far, for every attention layer; pass one object to each forward call.

    ``length``: tokens seen. A layer with a window keeps only the keys that a later query can see. Buffers double in
    size, so a layer holds at most ``2 · 2 · b · kv · d · min(length, window + n)`` elements, n being the tokens of
    a call (1 while generating). For inference only.

    limit: a query sees its own token and the ``limit − 1`` before it, as with a window of ``(limit − 1, 0)`` in every
    layer. Meant for a first call of at most ``limit`` tokens and then one token per call: layers do not apply the limit
    among the tokens of one call, where a query sees all tokens before its own.

    A copy (``copy.deepcopy``) or a pickle holds keys and values only, without their layers: the first forward pass that
    gets it assigns them in the order of its layers, in the same model or another with the same weights.

    In a forward pass every layer calls ``extend`` once, then the model calls ``advance``. After a pass cut short by an
    exception layers have seen different numbers of tokens; the next call raises ValueError, and the cache is unusable.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import KVCache, Transformer
        >>> config = dict(num_tokens=256, max_seq_len=64, dim=32, depth=2, heads=2, dim_head=16, causal=True)
        >>> model, tokens, cache = Transformer(**config).eval(), torch.randint(0, 256, (1, 10)), KVCache()
        >>> with torch.no_grad():
        ...     prompt = model(tokens[:, :9], cache=cache)
        ...     last = model(tokens[:, 9:], cache=cache)  # one token; keys and values of the others are there
        ...     whole = model(tokens)
        >>> torch.allclose(last, whole[:, 9:], atol=1e-5), cache.length
        (True, 10)
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None:
            require_positive_int("limit", limit)
        self.length, self.limit = 0, limit
        self._layers: dict[nn.Module, _LayerCache] = {}
        self._of_nobody: list[_LayerCache] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"length": self.length, "limit": self.limit, "layers": [*self._layers.values(), *self._of_nobody]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.length, self.limit = state["length"], state["limit"]
        self._layers, self._of_nobody = {}, list(state["layers"])

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in (*self._layers.values(), *self._of_nobody))

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor, left: int | None = None) -> tuple[Tensor, Tensor]:
        """Append ``(b, kv, n, ·)`` to the layer's keys and values and return all that the n new queries may see.

        left: how many keys before its own position a query of this layer sees (None: all). The returned tensors are
        views that are valid until the next call.

        Raises:
            ValueError: gradients are enabled, another shape, dtype or device than before, or a layer out of step.
        """
        require(not torch.is_grad_enabled(), "cache", "torch.no_grad() or inference_mode()", "gradients enabled")
        mine = self._layers.get(layer)
        if mine is None:
            fresh = _LayerCache(k[:, :, :0], v[:, :, :0])
            mine = self._layers[layer] = self._of_nobody.pop(0) if self._of_nobody else fresh
        expected = f"every layer to have seen {self.length} tokens, by one call in each forward pass"
        require(mine.seen == self.length, "cache", expected, f"one that has seen {mine.seen}")
        if self.limit is not None:
            left = self.limit - 1 if left is None else min(left, self.limit - 1)
        return mine.extend(k, v, left)

    def advance(self, tokens: int) -> None:
        """Count the tokens of a forward pass; call it once per pass, after every layer has extended."""
        self.length += tokens


@dataclass
class _LayerCache:
    """Buffers ``(b, kv, capacity, ·)`` of which the first ``stored`` places are filled; ``seen``: tokens in all."""

    keys: Tensor
    values: Tensor
    stored: int = 0
    seen: int = 0

    def extend(self, k: Tensor, v: Tensor, left: int | None) -> tuple[Tensor, Tensor]:
        # A batch of 1 would otherwise be broadcast into the buffers silently.
        known, kind = (_kind(*pair) for pair in ((self.keys, self.values), (k, v)))
        require(kind == known, "cache", f"batch, heads, widths, dtypes and device as before, {known}", kind)
        n = k.shape[2]
        kept = self.stored if left is None else min(self.stored, left)
        self.seen += n
        if left is not None and n > left:
            return self._replace(k, v, kept, left)
        if self.stored + n > self.keys.shape[2]:
            old = slice(self.stored - kept, self.stored)
            self.keys, self.values = (_roomy(b[:, :, old], 2 * (kept + n)) for b in (self.keys, self.values))
            self.stored = kept
        end = self.stored + n
        self.keys[:, :, self.stored : end] = k
        self.values[:, :, self.stored : end] = v
        self.stored = end
        return self.keys[:, :, end - kept - n : end], self.values[:, :, end - kept - n : end]

    def _replace(self, k: Tensor, v: Tensor, kept: int, left: int) -> tuple[Tensor, Tensor]:
        """Store the last ``left`` of new tokens that fill the window by themselves."""
        old = slice(self.stored - kept, self.stored)
        pairs = ((self.keys, k), (self.values, v))
        keys, values = (torch.cat((buffer[:, :, old], new), dim=2) if kept else new for buffer, new in pairs)
        self.keys, self.values = (_roomy(new[:, :, new.shape[2] - left :], 2 * (left + 1)) for new in (k, v))
        self.stored = left
        return keys, values


def _kind(k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Return the properties that may not change from call to call."""
    return *k.shape[:2], k.shape[3], v.shape[3], k.dtype, v.dtype, k.device


def _roomy(content: Tensor, capacity: int) -> Tensor:
    """Return a buffer of ``capacity`` places, the first of which hold ``content``."""
    with torch.inference_mode(False):  # so that later calls, in inference mode or not, may write to it
        buffer = content.new_empty(*content.shape[:2], capacity, content.shape[3])
    buffer[:, :, : content.shape[2]] = content
    return buffer
