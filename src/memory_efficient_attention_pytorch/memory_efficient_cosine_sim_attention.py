"""Attention by cosine similarity: unit-length queries and keys and a learned scale per head."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import require
from .functional.attention import dot_product_attention
from .memory_efficient_attention import Attention


class CosineSimAttention(Attention):
    """:class:`Attention` on l2-normalised queries and keys; scores are ``exp(scale_h) · cos(q, k)``.

    ``scale (1, heads, 1, 1)`` is the logarithm of a per-head factor, learned, which starts at ``log2(n² − n)`` for
    n = ``seq_len``, as in Henry et al., "Query-key normalization for transformers" (2020), arXiv:2010.04245.

    Args:
        seq_len: typical number of tokens, at least 2; the longer, the sharper the softmax at the start.

    Further arguments as for :class:`Attention`.
    """

    def __init__(self, *, dim: int, seq_len: int, heads: int = 8, **kwargs: Any) -> None:
        super().__init__(dim=dim, heads=heads, **kwargs)
        require(isinstance(seq_len, int) and seq_len >= 2, "seq_len", "an integer of at least 2", seq_len)
        self.scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(math.log2(seq_len**2 - seq_len))))

    def prepare(self, q: Tensor, k: Tensor, heads: slice) -> tuple[Tensor, Tensor, float | None]:
        dtype = q.dtype
        q = F.normalize(q.to(torch.promote_types(dtype, torch.float32)), dim=-1) * self.scale[:, heads].exp()
        k = F.normalize(k.to(torch.promote_types(dtype, torch.float32)), dim=-1)
        return q.to(dtype), k.to(dtype), 1.0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    attn_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Unscaled attention by the whole score matrix; q ``(b, h, n, d)`` already scaled. Other keywords: not needed."""
    return dot_product_attention(q, k, v, mask=mask, causal=causal, attn_bias=attn_bias, scale=1.0, backend="naive")


def numerically_unstable_memory_efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    attn_bias: Tensor | None = None,
    q_bucket_size: int = 512,
    k_bucket_size: int = 1024,
    eps: float = 1e-8,
) -> Tensor:
    """Unscaled attention under the name of version 0.1, which skipped the softmax's maximum; this one does not.

    q ``(b, h, n, d)`` already scaled, k and v ``(b, h, m, d)`` → ``(b, h, n, d)``. ``eps`` is accepted and not needed.
    """
    buckets: dict[str, Any] = {"q_bucket_size": q_bucket_size, "k_bucket_size": k_bucket_size}
    return dot_product_attention(q, k, v, mask=mask, causal=causal, attn_bias=attn_bias, scale=1.0, **buckets)
