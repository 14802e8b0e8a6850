"""Settings of a Transformer that trade speed for memory, from the fastest to the leanest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..attention.decision import KEEPS_FOR_ITSELF
from ..layers.working_set import splits
from ..models.config import TransformerConfig

LEAST_TOKENS = 128
"""Tokens per feed-forward chunk below which its matrix products become slow."""


class Candidate(NamedTuple):
    """A way of running the step: its name, and its changes to the settings of the candidates before it."""

    name: str
    changes: Mapping[str, Any]


def candidates(
    config: Mapping[str, Any],
    batch_size: int,
    seq_len: int,
    mixed_precision: bool,
    offload: bool = False,
    pieces: Mapping[str, int] = MappingProxyType({}),
) -> list[Candidate]:
    """Return the candidates from the fastest to the leanest. Settings in the configuration stay as they are.

    Under mixed precision reversal is exact, since rounding in low precision would grow from block to block.
    ``offload``: whether the device has memory of its own, so that moving kept attention to the host saves some.
    ``pieces``: the layers' own choice of numbers of pieces, which cost nothing where activations are recomputed anyway.
    """
    settings: dict[str, Any] = {}
    found: list[Candidate] = []

    def offer(name: str, **changes: Any) -> None:
        free = {key: value for key, value in changes.items() if key not in config}
        if not found or free.items() - settings.items():
            found.append(Candidate(name if free else "as configured", free))
            settings.update(free)

    tokens = batch_size * seq_len
    reversible = config.get("reversible", False)
    may_keep = config.get("backend") not in KEEPS_FOR_ITSELF
    kept = bool(config.get("reversible", True) and config.get("keep_attention", may_keep))
    how = {"reversible": reversible, "exact": reversible and mixed_precision, "keep_attention": reversible and kept}
    first = "reversible, in one piece" if reversible else "store everything"
    offer(first, **how, ff_chunks=1, head_chunks=1, loss_chunk_size=tokens)
    offer("loss in chunks", loss_chunk_size=None)
    chunks = [count for count in (8, 64, 512) if count * LEAST_TOKENS <= tokens and count <= seq_len]
    if chunks:
        offer(f"feed-forward in {chunks[0]} chunks", ff_chunks=chunks[0])
    blocks: dict[str, Any] = {} if "reversible" in config else {"reversible": True, "exact": mixed_precision}
    groups, ff_chunks = pieces.get("head_chunks", 1), pieces.get("ff_chunks", 1)
    blocks |= {"head_chunks": groups, "ff_chunks": max([ff_chunks, *chunks[:1]])} if groups > 1 or ff_chunks > 1 else {}
    if kept:
        offer("reversible with attention kept", **blocks, keep_attention=True)
        if offload:
            offer("attention kept in host memory", **blocks, keep_attention="cpu")
    offer("reversible blocks", **blocks, keep_attention=False)
    heads = config.get("heads", TransformerConfig.heads)
    for more in splits(heads, config.get("kv_heads") or heads):
        if more > groups:
            offer(f"heads in {more} groups", head_chunks=more)
    for count in chunks[1:]:
        if count > ff_chunks:
            offer(f"feed-forward in {count} chunks", ff_chunks=count)
    offer("loss in chunks of 32 tokens", loss_chunk_size=32)
    return found


def leanest(found: Iterable[Candidate]) -> dict[str, Any]:
    """Return the settings of all candidates together, which take the least memory."""
    return {name: value for candidate in found for name, value in candidate.changes.items()}
