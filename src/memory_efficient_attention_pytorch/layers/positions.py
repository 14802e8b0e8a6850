"""Positions: rotary embeddings, and biases that depend on the distance between query and key."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..common.errors import require, require_positive_int
from ..common.precision import full_dtype


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features of q and k by angles proportional to the position.

    ``(x_i, x_{i + d/2})`` turns by ``position · base**(−2i/d)``, so that scores depend on distances only.
    Source: Su et al., "RoFormer" (2021), arXiv:2104.09864, in the half-split layout of GPT-NeoX.

    Args:
        dim: width of a head, even.
        base: above 0; the slowest rotation's wavelength is about ``2π · base`` tokens. Sequences longer than that want
            more, 500,000 say.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import Attention, RotaryEmbedding
        >>> attention = Attention(dim=64, heads=4, dim_head=16, causal=True)
        >>> rotary = RotaryEmbedding(16)
        >>> attention(torch.randn(2, 300, 64), rotary=rotary(torch.arange(300))).shape
        torch.Size([2, 300, 64])
    """

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        require_positive_int("dim", dim)
        require(dim % 2 == 0, "dim", "an even width for rotary positions", dim)
        require(0 < base < math.inf, "base", "a number above 0", base)
        self.dim, self.base = dim, base

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``(…, n, dim/2)`` in fp32 of positions ``(n,)`` or ``(b, n)``."""
        # Computed here: a buffer would lose its contents on the meta device and its precision in a bf16 model.
        # In fp32 the angles would be off by 0.04 after a million tokens. Apple's GPUs have nothing wider.
        dtype = torch.float32 if positions.device.type == "mps" else torch.float64
        exponents = -torch.arange(0, self.dim, 2, dtype=dtype, device=positions.device) / self.dim
        angles = positions[..., None].to(dtype) * self.base**exponents
        angles = angles.remainder_(math.tau).float()
        return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x ``(b, h, n, d)`` by ``RotaryEmbedding(d)(positions)``, in fp32; return it in x's dtype."""
    cos, sin = (t[:, None] if t.dim() == 3 else t for t in table)
    first, second = x.to(full_dtype(x.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class AlibiBias(nn.Module):
    """Computes the bias ``−slope_h · |i − j|``, without parameters. Source: Press et al., "ALiBi", arXiv:2108.12409.

    Slopes are ``2**(−8/h), 2**(−16/h), …`` for h a power of two; for other h those of the next lower power, completed
    by every second slope of the next higher one, as in the paper's code.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import AlibiBias, dot_product_attention
        >>> q = torch.randn(1, 8, 1000, 64)
        >>> out = dot_product_attention(q, q, q, causal=True, attn_bias=AlibiBias(heads=8))
    """

    several_threads = True
    """Several threads may call it at the same time, each for heads of its own."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        require_positive_int("heads", heads)
        self.heads = heads

    def forward(self, query_positions: Tensor, key_positions: Tensor, heads: slice = slice(None)) -> Tensor:
        """Positions ``(i,)`` and ``(j,)`` → ``(h, i, j)`` in fp32, of the ``heads`` asked for."""
        # Exact in fp32 up to 2**24 tokens apart, and several times as fast as in integers.
        queries, keys = ((positions - key_positions[:1]).float() for positions in (query_positions, key_positions))
        distance = (queries[:, None] - keys).abs_()
        return -self.slopes(query_positions.device)[heads, None, None] * distance

    def slopes(self, device: torch.device | None = None) -> Tensor:
        """Return slopes ``(h,)`` in fp32, computed on use, as the frequencies of :class:`RotaryEmbedding` are."""
        lower = 2 ** math.floor(math.log2(self.heads))
        number = torch.arange(self.heads, dtype=torch.float32, device=device)
        return 2.0 ** torch.where(number < lower, -8 * (number + 1), -4 * (2 * (number - lower) + 1)).div(lower)


class RelativePositionBias(nn.Module):
    """A learned bias per head and bucket of distance. Source: Raffel et al., "T5" (2019), arXiv:1910.10683, §2.1.

    Half of the buckets hold single distances, the others grow logarithmically up to ``max_distance``. With
    ``bidirectional`` each direction has half of them, else keys after the query share the bucket of distance 0.

    Both arguments of ``forward`` must be runs of consecutive positions, as the tiles' are.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import RelativePositionBias, dot_product_attention
        >>> bias = RelativePositionBias(heads=8)
        >>> q = torch.randn(1, 8, 1000, 64)
        >>> dot_product_attention(q, q, q, attn_bias=bias).sum().backward()
        >>> bias.weight.grad.shape
        torch.Size([32, 8])
    """

    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        for argument, value in (("heads", heads), ("num_buckets", num_buckets), ("max_distance", max_distance)):
            require_positive_int(argument, value)
        each = num_buckets // 2 if bidirectional else num_buckets
        require(each >= 2, "num_buckets", "at least 2 for each direction", num_buckets)
        require(max_distance > each // 2, "max_distance", f"more than the {each // 2} single distances", max_distance)
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.randn(num_buckets, heads) * heads**-0.5)

    def bucket(self, relative: Tensor) -> Tensor:
        """Return the bucket of each distance, key position minus query position."""
        count = self.num_buckets
        start = torch.zeros_like(relative)
        if self.bidirectional:
            count //= 2
            start = (relative > 0).long() * count
            distance = relative.abs()
        else:
            distance = (-relative).clamp(min=0)
        single = count // 2
        growth = torch.log(distance.clamp(min=1).float() / single) / math.log(self.max_distance / single)
        far = (single + (growth * (count - single)).long()).clamp(max=count - 1)
        return start + torch.where(distance < single, distance, far)

    def forward(self, query_positions: Tensor, key_positions: Tensor, heads: slice = slice(None)) -> Tensor:
        """Return the bias ``(h, i, j)`` of positions ``(i,)`` and ``(j,)`` for these ``heads``."""
        i, j = len(query_positions), len(key_positions)
        # Only i + j − 1 distances occur in a tile: look each up once and slide along them.
        steps = torch.arange(i + j - 1, device=key_positions.device)
        relative = key_positions[0] - query_positions[-1] + steps
        by_distance = self.weight[self.bucket(relative), heads].t()
        return by_distance.unfold(1, j, 1).flip(1)
