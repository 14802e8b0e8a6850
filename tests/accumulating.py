"""Networks whose weights' gradients our own backward passes gather, and those gradients summed by hand."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memory_efficient_attention_pytorch import Attention, FeedForward, Transformer, linear_cross_entropy

TOLERANCE = 2e-5
LANGUAGE = {"num_tokens": 257, "max_seq_len": 64, "dim": 24, "depth": 2, "heads": 4, "dim_head": 8, "causal": True}


class FreshTotals(TorchDispatchMode):
    """The shapes of zeros made to gather a gradient in."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.zeros_like.default:
            self.shapes.append(out.shape)
        return out


class Head(nn.Module):
    """The loss with its weight, of a vocabulary that outnumbers the tokens."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction
        self.weight, self.bias = nn.Parameter(torch.randn(257, 24) / 5), nn.Parameter(torch.randn(257))

    def forward(self, x):
        labels = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 257
        labels[0, :3] = -100
        options = {"bias": self.bias, "reduction": self.reduction, "chunk_size": 7}
        return linear_cross_entropy(x, self.weight, labels, **options)


class Language(nn.Module):
    """A Transformer with its loss, for inputs that choose the tokens."""

    def __init__(self, **kwargs):
        super().__init__()
        self.net = Transformer(**LANGUAGE, head_chunks=2, ff_chunks=4, **kwargs)

    def forward(self, x):
        tokens = x.detach().sum(-1).abs().mul(1000).long() % 257
        return self.net(tokens, labels=tokens.roll(-1, 1))


MAKERS = {
    "feed-forward": lambda: FeedForward(24, 4, chunks=4),
    "attention": lambda: Attention(dim=24, heads=4, kv_heads=2, dim_head=8, head_chunks=2, causal=True),
    "loss": Head,
    "losses": lambda: Head("none"),
    "language model": Language,
    "reversible no more": lambda: Language(reversible=False),
    "exact": lambda: Language(exact=True),
}


def inputs(count=2, **kwargs):
    return [torch.randn(2, 20, 24, **kwargs) for _ in range(count)]


def loss_of(net, x):
    out = net(x)
    return out if out.dim() == 0 else (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


def by_hand(net, batches, start=0.0, loss=loss_of):
    """Every parameter's gradient summed over the batches, each found on its own."""
    leaves = [p for p in net.parameters() if p.requires_grad]
    total = [torch.full_like(p, start) for p in leaves]
    for x in batches:
        found = torch.autograd.grad(loss(net, x), leaves, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
    return total


def matrices(net):
    """Shapes of the weights whose gradients our own backward passes gather."""
    return {p.shape for n, p in net.named_parameters() if p.dim() == 2 and "emb" not in n}
