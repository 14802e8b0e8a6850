"""The Transformer that a user would write with PyTorch alone, to compare ours with.

Deliberately plain. It has the same parameters as ours (projections, biases, norms and embeddings) in one residual
stream, attention by ``scaled_dot_product_attention``, and PyTorch's own checkpointing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .shape import Shape


class SdpaAttention(nn.Module):
    """Computes causal multi-head attention, (batch, tokens, dim) in and out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.to_q = nn.Linear(shape.dim, shape.dim, bias=False)
        self.to_kv = nn.Linear(shape.dim, 2 * shape.dim, bias=False)
        self.to_out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return projected


class SdpaLayer(nn.Module):
    """Computes x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.dim * shape.ff_mult
        self.attention = nn.Sequential(nn.LayerNorm(shape.dim), SdpaAttention(shape))
        self.feedforward = nn.Sequential(
            nn.LayerNorm(shape.dim), nn.Linear(shape.dim, hidden), nn.GELU(), nn.Linear(hidden, shape.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.feedforward(x)
        return x


class SdpaTransformer(nn.Module):
    """A pre-norm causal Transformer with learned positions; ``forward(tokens, labels)`` returns the mean loss.

    Args:
        shape: what to build.
        checkpoint_layers: keep only each layer's input and recompute the rest in backward.
        loss_chunk_size: compute the loss over this many tokens at a time, recomputing their logits in backward;
            None computes all logits at once.
    """

    def __init__(self, shape: Shape, *, checkpoint_layers: bool = False, loss_chunk_size: int | None = None) -> None:
        super().__init__()
        self.checkpoint_layers = checkpoint_layers
        self.loss_chunk_size = loss_chunk_size
        self.token_emb = nn.Embedding(shape.num_tokens, shape.dim)
        self.pos_emb = nn.Embedding(shape.seq_len, shape.dim)
        self.layers = nn.ModuleList(SdpaLayer(shape) for _ in range(shape.depth))
        self.to_logits = nn.Sequential(nn.LayerNorm(shape.dim), nn.Linear(shape.dim, shape.num_tokens))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy, a scalar, of tokens and labels (b, n), int64."""
        x = self.token_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoint_layers else layer(x)
        if self.loss_chunk_size is None:
            return F.cross_entropy(self.to_logits(x).flatten(0, 1), labels.flatten())
        return self._chunked_loss(x.flatten(0, 1), labels.flatten(), self.loss_chunk_size)

    def _chunked_loss(self, hidden: Tensor, labels: Tensor, size: int) -> Tensor:
        pairs = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
        losses = [checkpoint(self._summed_loss, *pair, use_reentrant=False) for pair in pairs]
        return torch.stack(losses).sum() / labels.numel()

    def _summed_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.to_logits(hidden), labels, reduction="sum")
