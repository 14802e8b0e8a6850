"""The single description of a Transformer: type, default, help and range of each setting, for code and command line.

Does not import PyTorch, so that the command line can print help quickly.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..common.errors import require, require_positive_int

P = ParamSpec("P")
C = TypeVar("C")
M = TypeVar("M")


def knob(help: str, *, low: float | None = None, choices: tuple[str, ...] = (), unset: str = "") -> dict[str, Any]:
    """Return a field's metadata: its help, least value, choices, and the meaning of None."""
    return {"help": help, "low": low, "choices": choices, "unset": unset}


_BY_SHAPE = "by shapes and threads; 1 if not reversible"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The arguments of a :class:`Transformer`.

    Raises ValueError for a count below 1 and an unknown kind of positions; layers check their own arguments.
    """

    num_tokens: int = field(metadata=knob("size of the vocabulary", low=1))
    max_seq_len: int = field(
        metadata=knob("longest sequence; binding for learned positions, advisory for the others", low=1)
    )
    dim: int = field(metadata=knob("width of the model", low=1))
    depth: int = field(metadata=knob("number of blocks", low=1))
    causal: bool = field(
        default=False, metadata=knob("language model: a token sees only those before it; otherwise all")
    )
    dim_head: int = field(default=64, metadata=knob("width of one head", low=1))
    heads: int = field(default=8, metadata=knob("attention heads", low=1))
    ff_mult: int = field(default=4, metadata=knob("width of the feed-forward's hidden layer, in units of dim", low=1))
    ff_chunks: int | None = field(
        default=None, metadata=knob("chunks of tokens that the feed-forward is computed in", low=1, unset=_BY_SHAPE)
    )
    use_flash_attn: bool = field(
        default=True, metadata=knob("kept from version 0.1, where it chose between two algorithms; both agree here")
    )
    kv_heads: int | None = field(
        default=None, metadata=knob("key and value heads, a divisor of heads", low=1, unset="as many as heads")
    )
    window: int | tuple[int | None, int | None] | None = field(
        default=None,
        metadata=knob("tokens that a token sees before and after it: a number for both, or a pair", unset="all"),
    )
    positions: str = field(
        default="learned", metadata=knob("position encoding", choices=("learned", "rotary", "alibi", "none"))
    )
    rotary_base: float = field(
        default=10000.0,
        metadata=knob(
            "base of rotary positions, the slowest of which turn once in about 6 times as many tokens", low=0
        ),
    )
    dropout: float = field(default=0.0, metadata=knob("dropout of attention weights", low=0))
    head_chunks: int | None = field(
        default=None, metadata=knob("groups of heads that attention is computed in", low=1, unset=_BY_SHAPE)
    )
    keep_attention: bool | str = field(
        default=False,
        metadata=knob(
            "keep attention's outputs for backward, which saves time and takes memory; cpu: in host memory",
            choices=("cpu",),
        ),
    )
    reversible: bool = field(default=True, metadata=knob("rebuild activations in backward instead of storing them"))
    exact: bool = field(default=False, metadata=knob("rebuild activations bit for bit"))
    tie_embeddings: bool = field(
        default=False, metadata=knob("use the token embedding as the output layer too, then without bias")
    )
    loss_chunk_size: int | None = field(
        default=None, metadata=knob("tokens whose logits exist at once", low=1, unset="by the size of the vocabulary")
    )
    memory_efficient: bool = field(default=True, metadata=knob("kept from version 0.1; both values agree here"))
    q_bucket_size: int = field(default=512, metadata=knob("queries of an attention tile", low=1))
    k_bucket_size: int = field(default=1024, metadata=knob("keys of an attention tile", low=1))
    backend: str = field(default="auto", metadata=knob("way of computing attention, see dot_product_attention"))

    def __post_init__(self) -> None:
        for name, about in KNOBS.items():
            value = getattr(self, name)
            if about["low"] == 1 and not (value is None and about["unset"]):
                require_positive_int(name, value)
        require(0 < self.rotary_base < math.inf, "rotary_base", "a number above 0", self.rotary_base)
        choices = KNOBS["positions"]["choices"]
        require(self.positions in choices, "positions", f"one of {', '.join(choices)}", repr(self.positions))


KNOBS = {each.name: each.metadata for each in fields(TransformerConfig)}
"""Metadata of each field of TransformerConfig: a mapping of `help`, `low`, `choices` and `unset`."""

SETTINGS = ("reversible", "exact", "keep_attention", "ff_chunks", "head_chunks", "loss_chunk_size")
"""The fields that trade memory for time and change no result, which a memory budget may decide."""

TransformerConfig.__doc__ = f"{TransformerConfig.__doc__}\n    Fields:\n" + "\n".join(
    f"        {name}: {about['help']}{about['unset'] and '; None: '}{about['unset']}." for name, about in KNOBS.items()
)


@functools.cache
def value_type(config: type, name: str) -> type:
    """Return the type of a field's value other than None: the first of several, `tuple` for a tuple of strings.

    A `bool` field may have choices too, each of which means on.
    """
    hint = typing.get_type_hints(config)[name]
    first = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    kind: type = typing.get_origin(first) or first
    return kind


def built_from(config: Callable[P, C]) -> Callable[[Callable[[M, C], None]], Callable[Concatenate[M, P], None]]:
    """Turn an ``__init__`` that takes a configuration into one that takes its fields as keywords."""

    def decorate(init: Callable[[M, C], None]) -> Callable[Concatenate[M, P], None]:
        def from_keywords(self: M, /, *args: P.args, **keywords: P.kwargs) -> None:
            init(self, config(*args, **keywords))

        functools.update_wrapper(from_keywords, init)
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        keywords = inspect.signature(config).parameters.values()
        from_keywords.__signature__ = inspect.Signature([itself, *keywords])  # type: ignore[attr-defined]
        return from_keywords

    return decorate
