"""Cosine-similarity attention with a fixed scale, as in version 0.1's module of this name."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .flash_attention import FlashAttention as _FlashAttention
from .functional.attention import dot_product_attention


class FlashAttention(_FlashAttention):
    """:class:`Attention` on l2-normalised queries and keys; scores are ``scale · cos(q, k)``, ``scale`` a number."""

    def __init__(self, *, dim: int, scale: float = 16, **kwargs: Any) -> None:
        super().__init__(dim=dim, **kwargs)
        self.scale = scale

    def prepare(self, q: Tensor, k: Tensor, heads: slice) -> tuple[Tensor, Tensor, float | None]:
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), float(self.scale)


class FlashAttentionFunction:
    """``apply`` of version 0.1: attention by tiles, with the scale given."""

    @staticmethod
    def apply(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        q_bucket_size: int,
        k_bucket_size: int,
    ) -> Tensor:
        """q, k, v ``(b, h, n, d)``, q and k of unit length, mask ``(b, m)`` → ``(b, h, n, d)``."""
        buckets: dict[str, Any] = {"q_bucket_size": q_bucket_size, "k_bucket_size": k_bucket_size}
        return dot_product_attention(q, k, v, mask=mask, causal=causal, scale=float(scale), backend="tiled", **buckets)
