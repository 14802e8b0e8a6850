"""Networks that several tests share: branches from outside of the library, its own, and the definition of a chain."""

import torch
import torch.nn.functional as F
from torch import nn

from memory_efficient_attention_pytorch import Attention, FeedForward, PreNorm, ReversibleSequence
from tests.agreement import assert_same, gradients

DIM = 8


class Plain(nn.Module):
    """A branch from outside of the library, with dropout and an optional context."""

    def __init__(self, dim=DIM, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(dropout), nn.Linear(dim, dim)
        )

    def forward(self, x, context=None):
        return self.net(x if context is None else x * torch.sigmoid(context))


def plain(depth=3, **kwargs):
    return nn.ModuleList([nn.ModuleList([Plain(**kwargs), Plain(**kwargs)]) for _ in range(depth)])


def layers(depth=3, dim=DIM, heads=4, head_chunks=1, ff_chunks=1, **kwargs):
    """The library's own branches, in pieces where asked."""
    attention = {"dim": dim, "heads": heads, "dim_head": dim // heads, "causal": True, "head_chunks": head_chunks}
    return nn.ModuleList(
        nn.ModuleList(
            [PreNorm(dim, Attention(**attention, **kwargs)), PreNorm(dim, FeedForward(dim, 2, chunks=ff_chunks))]
        )
        for _ in range(depth)
    )


def stored(blocks, x, routes=None, **kwargs):
    """The definition, with everything stored."""
    x1 = x2 = x
    for i, (f, g) in enumerate(blocks):
        to_f, to_g = ({k: kwargs[k] for k in kwargs if routes[k][i][side]} for side in (0, 1))
        x1 = x1 + f(x2, **to_f)
        x2 = x2 + g(x1, **to_g)
    return x1 + x2


def tokens(*shape, dtype=torch.float32, requires_grad=True):
    return torch.randn(*(shape or (2, 7, DIM)), dtype=dtype, requires_grad=requires_grad)


def trainable(*sources):
    """Tensors and the parameters of modules, those that want a gradient."""
    parameters = (p for s in sources for p in ((s,) if isinstance(s, torch.Tensor) else s.parameters()))
    return tuple(p for p in parameters if p.requires_grad)


IN_PIECES = {"head_chunks": 2, "ff_chunks": 3}
KINDS = {"plain": plain, "layers": layers, "pieces": lambda **kwargs: layers(**IN_PIECES, **kwargs)}


class TokenMLP(nn.Module):
    """Norm, a wide hidden layer, dropout and a residual: what feed-forwards outside of the library look like."""

    def __init__(self, dim=8, hidden=24, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))


def check(blocks, x, tolerance, extra=(), routes=None, **kwargs):
    """A reversible sequence of `blocks` against the same blocks stored: outputs and every gradient."""
    wanted = trainable(x, *extra, blocks)
    ours, truth = ReversibleSequence(blocks, routes or {})(x, **kwargs), stored(blocks, x, routes, **kwargs)
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), tolerance)
