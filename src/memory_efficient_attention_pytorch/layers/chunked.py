"""Run any token-wise module in chunks, in forward and in backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..common.compiled import eagerly
from ..common.errors import require, require_positive_int
from ..recompute.pieces import Branch, ChunkBranch, in_pieces


class Chunked(nn.Module):
    """Applies any token-wise module to one chunk of tokens at a time, in forward and in backward.

    ``Chunked(module)(x)`` equals ``module(x)`` in outputs and gradients for a module that treats each position along
    ``dim`` independently. Only x is kept for backward, where each chunk is recomputed, so the module's own saved
    tensors exist for one chunk at a time. Dropout draws one mask per chunk, the same in both passes; autocast settings
    are recorded. Differentiable once.

    Args:
        module: takes and returns a tensor, keeping ``dim``.
        chunks: how many chunks (the last may be shorter), or
        chunk_size: how many positions a chunk holds. Give one of the two.
        dim: the chunked dimension.

    Raises:
        ValueError: not exactly one of chunks and chunk_size, one below 1, or a module that changes ``dim``.

    Source: feed-forward chunking of Kitaev et al., "Reformer" (2020), arXiv:2001.04451.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memory_efficient_attention_pytorch import Chunked
        >>> mlp = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64))
        >>> x = torch.randn(2, 1000, 64)
        >>> torch.allclose(Chunked(mlp, chunks=8)(x), mlp(x), atol=1e-6)
        True
    """

    def __init__(
        self, module: nn.Module, chunks: int | None = None, chunk_size: int | None = None, dim: int = 1
    ) -> None:
        super().__init__()
        one = (chunks is None) != (chunk_size is None)
        require(one, "chunks, chunk_size", "exactly one of them", (chunks, chunk_size))
        require_positive_int(*(("chunks", chunks) if chunk_size is None else ("chunk_size", chunk_size)))
        self.module, self.chunks, self.chunk_size, self.dim = module, chunks, chunk_size, dim

    def as_branch(self, x: Tensor, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> Branch:
        require(not kwargs, "Chunked", "no keyword arguments", ", ".join(kwargs))
        return ChunkBranch(self.module, norm, chunks=self.chunks or 1, chunk_size=self.chunk_size, dim=self.dim)

    def forward(self, x: Tensor) -> Tensor:
        return eagerly(in_pieces, self, x, {})
