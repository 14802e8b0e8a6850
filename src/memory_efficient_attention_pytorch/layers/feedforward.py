"""The feed-forward half of a block, and normalisation before a branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.compiled import eagerly
from ..common.dry_run import each
from ..common.errors import require, require_positive_int
from ..common.precision import compute_dtype, full_dtype, require_dtype_of
from ..common.products import Scratch
from ..recompute.by_hand import reason_against
from ..recompute.normed import Normed, is_norm_of_tokens
from ..recompute.pieces import Add, Branch, ChunkBranch, Repetition, branch_of, in_pieces
from .chunked import Chunked
from .working_set import chunks_for


class FeedForward(nn.Module):
    """Computes ``Linear(dim, mult·dim) → GELU → Linear(mult·dim, dim)`` in ``chunks`` chunks of tokens.

    Maps x ``(b, n, dim)`` to ``(b, n, dim)``. With more than one chunk the hidden values ``(b, n, mult·dim)`` never
    exist as a whole: only x is kept, and backward recomputes one chunk at a time. None: as many chunks as keep a
    chunk's working set small (see :mod:`.working_set`).

    Raises ValueError for a size below 1.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import FeedForward
        >>> FeedForward(64, mult=4, chunks=8)(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])
    """

    def __init__(self, dim: int, mult: int = 4, chunks: int | None = None) -> None:
        super().__init__()
        for argument, value in (("dim", dim), ("mult", mult), ("chunks", 1 if chunks is None else chunks)):
            require_positive_int(argument, value)
        self.hidden, self.chunks = dim * mult, chunks
        self.net = nn.Sequential(nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim))

    def as_branch(self, x: Tensor, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> Branch:
        require(not kwargs, "FeedForward", "no keyword arguments", ", ".join(kwargs))
        return (FeedForwardBranch if self._plain else ChunkBranch)(self.net, norm, chunks=self._chunks(x))

    def _chunks(self, x: Tensor) -> int:
        return chunks_for(x, self.hidden) if self.chunks is None else self.chunks

    @property
    def _plain(self) -> bool:
        """Whether the layers are as built and have no hooks."""
        parts, kinds = (self.net, *self.net), (nn.Sequential, nn.Linear, nn.GELU, nn.Linear)
        known = len(parts) == len(kinds) and not any(map(reason_against, parts, kinds))
        return known and self.net[0].bias is not None and self.net[2].bias is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self._chunks(x) == 1 else eagerly(in_pieces, self, x, {})


class FeedForwardBranch(ChunkBranch):
    """Computes ``net(norm(x))`` in chunks of tokens, with the weights' gradients summed in place."""

    def compute(self, x: Tensor, kwargs: dict[str, Any], add: Add) -> None:
        normed = Normed(x, self.norm)
        net = _Cast(self.module, x)
        for index in each(self.slices(x)):
            hidden, _ = net.hidden(normed.at(index).to(net.scratch.dtype))
            add(index, net.out(hidden))

    def compute_again(self, x: Tensor, kwargs: dict[str, Any], again: Repetition) -> None:
        normed, sums = Normed(x, self.norm), again.sums
        inner, _, outer = self.module
        net = _Cast(self.module, x)
        for index in each(self.slices(x)):
            values = normed.with_graph(index).to(net.scratch.dtype)
            hidden, before = net.hidden(values)
            if again.add is not None:
                again.add(index, net.out(hidden))
            upstream = again.cotangent[index].to(net.scratch.dtype)
            sums.add_product(outer.weight, upstream, hidden)
            sums.add(outer.bias, _over_tokens(upstream))
            upstream = net.through_activation(upstream, before)
            sums.add_product(inner.weight, upstream, values)
            sums.add(inner.bias, _over_tokens(upstream))
            if normed.passes_on(again):
                normed.backward(index, net.through_inner(upstream), again)


class _Cast:
    """Holds the network's weights in its compute dtype, and buffers for one chunk."""

    def __init__(self, net: Any, x: Tensor) -> None:
        inner, self.activation, outer = net
        require_dtype_of(inner.weight, "x", x)
        dtype = compute_dtype(x)
        self.inner, self.outer = ((layer.weight.to(dtype), layer.bias.to(dtype)) for layer in (inner, outer))
        self.scratch = Scratch(dtype, x.device)

    def hidden(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden values ``(…, mult·dim)`` of ``(…, dim)``, after and before the activation."""
        before = self.scratch.linear("before", values, *self.inner)
        after = self.scratch.take("hidden", *before.shape)
        return torch.ops.aten.gelu.out(before, approximate=self.activation.approximate, out=after), before

    def out(self, hidden: Tensor) -> Tensor:
        return self.scratch.linear("out", hidden, *self.outer)

    def through_activation(self, upstream: Tensor, before: Tensor) -> Tensor:
        """Return the cotangent of ``before`` from the output's; overwrites the hidden values."""
        inward = self.scratch.linear("hidden", upstream, self.outer[0].t())
        how = self.activation.approximate
        torch.ops.aten.gelu_backward.grad_input(inward, before, approximate=how, grad_input=inward)
        return inward

    def through_inner(self, upstream: Tensor) -> Tensor:
        return self.scratch.linear("out", upstream, self.inner[0].t())


def _over_tokens(upstream: Tensor) -> Tensor:
    """Sum over all but the last dimension, in fp32 at least."""
    return upstream.flatten(0, -2).sum(dim=0, dtype=full_dtype(upstream.dtype))


class PreNorm(nn.Module):
    """Computes ``fn(LayerNorm(x))``; in a :class:`ReversibleSequence` each piece of fn includes its norm.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import FeedForward, PreNorm
        >>> x = torch.randn(2, 1000, 64)
        >>> (x + PreNorm(64, FeedForward(64))(x)).shape
        torch.Size([2, 1000, 64])
    """

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def as_branch(self, x: Tensor, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> Branch:
        # Slices of the features cannot be normalised by themselves.
        of_features = isinstance(self.fn, Chunked) and self.fn.dim % x.dim() == x.dim() - 1
        fuses = norm is None and is_norm_of_tokens(self.norm) and not of_features
        return branch_of(self.fn, x, kwargs, self.norm) if fuses else Branch(self, kwargs, norm)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = self.fn(self.norm(x), **kwargs)
        return out
