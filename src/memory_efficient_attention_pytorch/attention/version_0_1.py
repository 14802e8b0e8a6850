"""The functions of version 0.1, under its names and with its arguments."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from .bias import BiasModule
from .functional import dot_product_attention


class _Buckets(TypedDict):
    q_bucket_size: int
    k_bucket_size: int


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    attn_bias: Tensor | BiasModule | None = None,
    dropout: float = 0.0,
    training: bool = False,
    **_: Any,
) -> Tensor:
    """Compute :func:`memory_efficient_attention` by the whole score matrix; bucket sizes and eps are ignored."""
    rate = dropout if training else 0.0
    return dot_product_attention(q, k, v, mask=mask, causal=causal, attn_bias=attn_bias, dropout=rate, backend="naive")


def memory_efficient_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    attn_bias: Tensor | BiasModule | None = None,
    q_bucket_size: int = 512,
    k_bucket_size: int = 1024,
    eps: float = 1e-8,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Call :func:`dot_product_attention` under the name and with the arguments of version 0.1.

    q, k, v ``(b, h, n, d)`` → ``(b, h, n, d)``; dropout only when ``training``; ``eps`` is ignored.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import memory_efficient_attention
        >>> q, k, v = (torch.randn(1, 8, 100, 64) for _ in range(3))
        >>> memory_efficient_attention(q, k, v, causal=True).shape
        torch.Size([1, 8, 100, 64])
    """
    rate = dropout if training else 0.0
    buckets = _Buckets(q_bucket_size=q_bucket_size, k_bucket_size=k_bucket_size)
    return dot_product_attention(q, k, v, mask=mask, causal=causal, attn_bias=attn_bias, dropout=rate, **buckets)


def unscaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    attn_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Compute unscaled attention by the whole score matrix; q ``(b, h, n, d)`` already scaled. Others are ignored."""
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
    """Compute unscaled attention under the name of version 0.1, which skipped the softmax's maximum; this does not.

    q ``(b, h, n, d)`` already scaled, k and v ``(b, h, m, d)`` → ``(b, h, n, d)``. ``eps`` is ignored.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import numerically_unstable_memory_efficient_attention
        >>> q, k, v = (torch.randn(1, 8, 100, 64) for _ in range(3))
        >>> numerically_unstable_memory_efficient_attention(q * 64**-0.5, k, v).shape
        torch.Size([1, 8, 100, 64])
    """
    buckets = _Buckets(q_bucket_size=q_bucket_size, k_bucket_size=k_bucket_size)
    return dot_product_attention(q, k, v, mask=mask, causal=causal, attn_bias=attn_bias, scale=1.0, **buckets)


class FlashAttentionFunction:
    """Has ``apply`` of version 0.1: attention by tiles, scaled by ``d ** -0.5``."""

    @staticmethod
    def apply(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, q_bucket_size: int, k_bucket_size: int
    ) -> Tensor:
        """Map q, k, v ``(b, h, n, d)``, mask ``(b, m)`` or broadcastable to ``(b, h, n, m)``, to ``(b, h, n, d)``."""
        buckets = _Buckets(q_bucket_size=q_bucket_size, k_bucket_size=k_bucket_size)
        return dot_product_attention(q, k, v, mask=mask, causal=causal, backend="tiled", **buckets)


class CosineSimFlashAttentionFunction:
    """Has ``apply`` of version 0.1: attention by tiles, with the given scale."""

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
        """Map q, k, v ``(b, h, n, d)``, q and k of unit length, mask ``(b, m)``, to ``(b, h, n, d)``."""
        buckets = _Buckets(q_bucket_size=q_bucket_size, k_bucket_size=k_bucket_size)
        return dot_product_attention(q, k, v, mask=mask, causal=causal, scale=scale, backend="tiled", **buckets)
