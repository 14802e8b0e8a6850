"""Masks of transformers' models, passed on as arguments of attention, never as an n × m tensor.

transformers describes a mask as a function of indices, composed of a few known ones. Those with a counterpart in
:func:`dot_product_attention` (causality, windows, packed sequences, padding) are recognised by their composition;
anything else stays a function and is evaluated per tile. A release that composes them differently only loses speed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from ..attention.mask_function import MaskFunction
from ..common.divided import Divided, refuse_divided
from ..common.errors import require
from .visible import Visible

NAME = "memory_efficient"
"""The name under which attention and masks are registered with transformers."""

IndexFunction = Callable[..., Any]

EAGER: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""By their ids the configurations of changed models whose own attention was eager: its masks are never left out."""


@dataclass(frozen=True)
class DividedTokens:
    """Padding and document numbers ``(b, local)`` of tokens divided over processes, in place of a padding mask."""

    divided: Divided
    padding: Tensor | None
    document_ids: Tensor | None
    ndim = 4  # transformers does not look into 4-d masks

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, 1, self.divided.local_tokens, self.divided.local_tokens


def divided_tokens(
    divided: Divided, attention_mask: Tensor | None, position_ids: Tensor | None, like: Tensor
) -> tuple[DividedTokens, Tensor]:
    """Return what replaces the mask, and positions ``(b or 1, local)`` in the whole sequence.

    like: ``(b, local, …)``, of this process's tokens. As on one process, without a mask a position that is not its
    predecessor's plus one begins a document.

    Raises ValueError for a mask of another shape than ``(b, local)``.
    """
    if attention_mask is not None:
        expected = f"shape (batch, tokens of this process) = {(len(like), divided.local_tokens)}"
        came = getattr(attention_mask, "shape", type(attention_mask).__name__)
        require(tuple(came) == (len(like), divided.local_tokens), "attention_mask", expected, came)
        attention_mask = attention_mask.bool()
    if position_ids is None:
        return DividedTokens(divided, attention_mask, None), divided.positions(like.device)[None]
    documents = None
    if attention_mask is None:
        whole = divided.gather(position_ids.expand(len(like), -1))
        numbers = (whole.diff(dim=1, prepend=whole[:, :1] - 1) != 1).cumsum(dim=1)
        if bool(numbers[:, -1].any()):
            documents = numbers[:, divided.positions(like.device)]
    return DividedTokens(divided, attention_mask, documents), position_ids


class _Simple(NamedTuple):
    causal: bool = False
    left: int | None = None  # keys before a query's own, None for all
    right: int | None = None
    document_ids: Tensor | None = None
    chunks: tuple[int, Tensor] | None = None  # tokens per chunk, first token (b,)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # looks at closures and values: one break of the graph for all layers
def memory_efficient_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: IndexFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | Visible | DividedTokens | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **ignored: Any,
) -> Visible:
    """Make a mask for ``AttentionMaskInterface``: query i is at ``i + q_offset``, key j at ``j + kv_offset``."""
    if isinstance(attention_mask, Visible):  # made before, as generation does for static caches
        return attention_mask
    parts = None if use_vmap else _simple(mask_function)
    if isinstance(attention_mask, DividedTokens):
        return _of_divided(attention_mask, batch_size, (q_length, kv_length), torch.device(device), parts)
    refuse_divided("a model whose loss make_memory_efficient left unchanged")
    arguments: dict[str, Any] = {}
    padding = _padding(attention_mask, kv_length, kv_offset)
    aligned = isinstance(q_offset, int) and q_offset - kv_offset == kv_length - q_length
    whole = parts is not None and parts.document_ids is not None and q_length != kv_length
    if parts is not None and not whole and (aligned or parts == _Simple()):
        if parts.causal:
            arguments["causal"] = True
        if (parts.left, parts.right) != (None, None):
            arguments["window"] = (parts.left, parts.right)
        documents = parts.document_ids
        if parts.chunks is not None:
            size, first = parts.chunks
            keys = torch.arange(kv_offset, kv_offset + kv_length, device=first.device)
            documents = (keys - first[:, None]) // size
        # While traced, transformers cannot look at values and passes document numbers even for a single document.
        if documents is not None and not _is_constant(documents):
            arguments["document_ids"] = documents
        if padding is not None:
            arguments["mask"] = padding
    else:
        function = _vmapped(mask_function) if use_vmap else mask_function

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen: Tensor = function(batch, head, query + q_offset, key + kv_offset)
            return seen if padding is None else seen & padding[batch, key]

        arguments["mask"] = MaskFunction(visible)
    may_be_left_out = allow_is_causal_skip if "causal" in arguments else allow_is_bidirectional_skip
    left_out = may_be_left_out and q_length == kv_length and _hides_nothing_else(arguments, kv_length)
    left_to_layers = left_out and not (config is not None and id(config) in EAGER)
    sizes = (batch_size, q_length, kv_length)
    return Visible(*sizes, arguments, torch.device(device), left_to_layers=left_to_layers)


def _hides_nothing_else(arguments: dict[str, Any], keys: int) -> bool:
    """Return whether causality alone, or nothing, is what the arguments say of so many keys and queries."""
    sides = [side for side in arguments.get("window", ()) if side is not None]
    return arguments.keys() <= {"causal", "window"} and all(side >= keys - 1 for side in sides)


def _of_divided(
    tokens: DividedTokens, batch: int, sizes: tuple[int, int], device: torch.device, parts: _Simple | None
) -> Visible:
    known = parts is not None and parts.document_ids is None and parts.chunks is None
    if parts is None or not known or sizes != (tokens.divided.local_tokens,) * 2:
        raise NotImplementedError("mask: tokens divided over processes support only causality and windows")
    sides = (parts.left, parts.right)
    given: dict[str, Any] = {"mask": tokens.padding, "document_ids": tokens.document_ids}
    given |= {"causal": parts.causal, "window": None if sides == (None, None) else sides}
    arguments = {name: value for name, value in given.items() if value is not None}
    return Visible(batch, *sizes, arguments, device, tokens.divided)


def _padding(attention_mask: Tensor | None, keys: int, offset: int) -> Tensor | None:
    """Return key padding ``(b, keys)``, True at tokens; None if there is no padding."""
    if attention_mask is None:
        return None
    missing = max(0, keys + offset - attention_mask.shape[-1])
    padding = torch.nn.functional.pad(attention_mask.bool(), (0, missing))[:, offset : offset + keys]
    return None if _is_constant(padding) and bool(padding[:, 0].all()) else padding


def _is_constant(tensor: Tensor) -> bool:
    """Return True if each row holds a single value; False for tensors without contents."""
    known = type(tensor) is Tensor and tensor.device.type != "meta"
    return known and bool((tensor == tensor[:, :1]).all())


def _simple(function: IndexFunction) -> _Simple | None:
    """Return the parts that the mask function is composed of, if each has a counterpart; else None."""
    if function is masking_utils.causal_mask_function:
        return _Simple(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Simple()
    if getattr(function, "__module__", None) != masking_utils.__name__ or not inspect.isfunction(function):
        return None
    held = inspect.getclosurevars(function).nonlocals
    made_by = function.__qualname__.split(".")[0]
    if made_by == "and_masks" and set(held) == {"mask_functions"}:
        parts = [_simple(part) for part in held["mask_functions"]]
        known = [part for part in parts if part is not None]
        return _both(known) if len(known) == len(parts) else None
    if made_by == "sliding_window_overlay" and set(held) == {"sliding_window"}:
        return _Simple(left=held["sliding_window"] - 1)
    if made_by == "sliding_window_bidirectional_overlay" and set(held) == {"sliding_window"}:
        return _Simple(left=held["sliding_window"], right=held["sliding_window"])
    if made_by == "chunked_overlay" and set(held) == {"chunk_size", "left_padding"}:
        return _Simple(chunks=(held["chunk_size"], held["left_padding"]))
    if made_by == "packed_sequence_mask_function" and set(held) == {"packed_sequence_mask"}:
        return _Simple(document_ids=held["packed_sequence_mask"])
    # Within a packed sequence positions increase by one, so distances, all that matters here, are those of indices.
    # transformers uses this only together with the mask of packed sequences.
    if made_by == "remap_positions_for_packed_sequence" and set(held) == {"mask_function", "position_ids"}:
        return _simple(held["mask_function"])
    return None


def _both(parts: list[_Simple]) -> _Simple | None:
    documents = [p.document_ids for p in parts if p.document_ids is not None]
    chunks = [p.chunks for p in parts if p.chunks is not None]
    if len(documents) + len(chunks) > 1:
        return None
    left, right = (
        min((side for side in sides if side is not None), default=None)
        for sides in ([p.left for p in parts], [p.right for p in parts])
    )
    causal = any(p.causal for p in parts)
    return _Simple(causal, left, right, next(iter(documents), None), next(iter(chunks), None))


def _vmapped(function: IndexFunction) -> IndexFunction:
    """Vectorise a user's function, which may be written for scalars, over each index, as transformers itself does."""
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = torch.vmap(function, in_dims=dims, out_dims=0)

    def visible(*indices: Tensor) -> Tensor:
        with vars(masking_utils)["TransformGetItemToIndex"]():
            seen: Tensor = function(*(index.flatten() for index in indices))
        return seen

    return visible
