"""Attention by cosine similarity: unit-length queries and keys and a learned scale per head."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import require
from ..common.precision import full_dtype
from .attention import Attention, FlashAttention


class CosineSimAttention(Attention):
    """:class:`Attention` on l2-normalised queries and keys; scores are ``exp(scale_h) · cos(q, k)``.

    ``scale (1, heads, 1, 1)`` is the logarithm of a per-head factor, learned, which starts at ``log2(n² − n)`` for
    n = ``seq_len``, as in Henry et al., "Query-key normalization for transformers" (2020), arXiv:2010.04245.

    Args:
        seq_len: typical number of tokens, at least 2; the longer, the sharper the softmax at the start.

    Further arguments as for :class:`Attention`.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import CosineSimAttention
        >>> attention = CosineSimAttention(dim=64, seq_len=300, heads=4, dim_head=16, causal=True)
        >>> attention(torch.randn(2, 300, 64)).shape
        torch.Size([2, 300, 64])
    """

    def __init__(self, *, dim: int, seq_len: int, heads: int = 8, **kwargs: Any) -> None:
        super().__init__(dim=dim, heads=heads, **kwargs)
        require(isinstance(seq_len, int) and seq_len >= 2, "seq_len", "an integer of at least 2", seq_len)
        self.scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(math.log2(seq_len**2 - seq_len))))

    def prepare(self, q: Tensor, k: Tensor, heads: slice) -> tuple[Tensor, Tensor, float | None]:
        scaled = _unit(q) * self.scale[:, heads].exp()
        return scaled.to(q.dtype), _unit(k).to(k.dtype), 1.0


class CosineSimFlashAttention(FlashAttention):
    """:class:`Attention` on l2-normalised queries and keys; scores are ``scale · cos(q, k)``, ``scale`` a number."""

    def __init__(self, *, dim: int, scale: float = 16, **kwargs: Any) -> None:
        super().__init__(dim=dim, **kwargs)
        self.scale = scale

    def prepare(self, q: Tensor, k: Tensor, heads: slice) -> tuple[Tensor, Tensor, float | None]:
        return _unit(q).to(q.dtype), _unit(k).to(k.dtype), float(self.scale)


def _unit(x: Tensor) -> Tensor:
    """Return x with vectors of unit length (zeros stay zeros), in fp32 at least."""
    return F.normalize(x.to(full_dtype(x.dtype)), dim=-1)
