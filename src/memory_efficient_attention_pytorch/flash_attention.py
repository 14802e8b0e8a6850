"""The module and the function that the seed's users import as FlashAttention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .functional.attention import dot_product_attention
from .memory_efficient_attention import Attention


class FlashAttention(Attention):
    """:class:`Attention` under its other name, with the positional order of arguments of version 0.1."""

    def __init__(self, *, dim: int, **kwargs: Any) -> None:
        super().__init__(dim=dim, **{"memory_efficient": True, **kwargs})

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x ``(b, n, dim)`` → ``(b, n, dim)``; further keywords as for :meth:`Attention.forward`."""
        buckets: dict[str, Any] = {"q_bucket_size": q_bucket_size, "k_bucket_size": k_bucket_size}
        return super().forward(x, context, mask, **buckets, **kwargs)


class FlashAttentionFunction:
    """``apply`` of version 0.1: attention by tiles, scaled by ``d ** -0.5``."""

    @staticmethod
    def apply(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, q_bucket_size: int, k_bucket_size: int
    ) -> Tensor:
        """q, k, v ``(b, h, n, d)``, mask ``(b, m)`` or broadcastable to ``(b, h, n, m)`` → ``(b, h, n, d)``."""
        buckets: dict[str, Any] = {"q_bucket_size": q_bucket_size, "k_bucket_size": k_bucket_size}
        return dot_product_attention(q, k, v, mask=mask, causal=causal, backend="tiled", **buckets)
