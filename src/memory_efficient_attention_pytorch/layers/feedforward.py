"""The feed-forward half of a block, and normalisation before a branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import require, require_positive_int
from ..common.products import Scratch
from ..recompute.linear_pieces import Gradients, compute_dtype, normed_piece
from ..recompute.pieces import Add, Branch, ChunkBranch, apply_piecewise, has_hooks, pieces_of
from .chunked import chunked_branch
from .linear import Linear, is_plain_linear


class FeedForward(nn.Module):
    """``Linear(dim, mult·dim) → GELU → Linear(mult·dim, dim)``, in ``chunks`` chunks of tokens.

    x ``(b, n, dim)`` → ``(b, n, dim)``. With more than one chunk the hidden values ``(b, n, mult·dim)`` never exist as
    a whole, in backward neither: x alone is kept and each chunk is computed once more there.
    """

    def __init__(self, dim: int, mult: int = 4, chunks: int = 1) -> None:
        super().__init__()
        for argument, value in (("dim", dim), ("mult", mult), ("chunks", chunks)):
            require_positive_int(argument, value)
        self.chunks = chunks
        self.net = nn.Sequential(Linear(dim, dim * mult), nn.GELU(), Linear(dim * mult, dim))

    def as_branch(self, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> Branch:
        require(not kwargs, "FeedForward", "no keyword arguments", ", ".join(kwargs))
        if self.chunks > 1 and self._plain:
            return FeedForwardBranch(self.net, norm, self.chunks)
        return chunked_branch(self.net, norm, chunks=self.chunks)

    @property
    def _plain(self) -> bool:
        """Is everything as it was built, with nobody watching the layers?"""
        layers = list(self.net)
        built = len(layers) == 3 and type(layers[1]) is nn.GELU and all(map(is_plain_linear, layers[::2]))
        unwatched = not any(has_hooks(module) for module in self.net.modules())
        return built and unwatched and layers[0].bias is not None and layers[2].bias is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.chunks == 1 else apply_piecewise(self.as_branch({}), x)


class FeedForwardBranch(ChunkBranch):
    """``net(norm(x))`` in chunks of tokens, with the weights' gradients summed in place."""

    def __init__(self, net: nn.Sequential, norm: nn.Module | None, chunks: int) -> None:
        modules = [net] if norm is None else [norm, net]
        super().__init__(net, modules, chunks=chunks)
        self.net: Any = net
        self.norm = norm

    def run(self, x: Tensor, inputs: Sequence[Tensor], add: Add) -> None:
        net = _Cast(self.net, compute_dtype(x), x.device)
        for index in self.slices(x):
            values = x[index] if self.norm is None else self.norm(x[index])
            hidden, _ = net.hidden(values.to(net.scratch.dtype))
            add(index, net.out(hidden))

    def differentiate(
        self,
        x: Tensor,
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        cotangent: Tensor,
        add: Add | None,
        add_gradient: Add | None,
    ) -> list[Tensor | None]:
        inner, _, outer = self.net
        grads = Gradients(self.leaves(inputs, needed), needed, add_gradient)
        net = _Cast(self.net, compute_dtype(x), x.device)
        for index in self.slices(x):
            piece, normed = normed_piece(x, index, self.norm)
            values = normed.detach().to(net.scratch.dtype)
            hidden, before = net.hidden(values)
            if add is not None:
                add(index, net.out(hidden))
            upstream = cotangent[index].to(net.scratch.dtype)
            grads.add_product(outer.weight, upstream, hidden)
            grads.add(outer.bias, _over_tokens(upstream))
            upstream = net.through_activation(upstream, before)
            grads.add_product(inner.weight, upstream, values)
            grads.add(inner.bias, _over_tokens(upstream))
            grads.through_norm(index, self.norm, piece, normed, net.through_inner(upstream))
        return grads.totals


class _Cast:
    """The network's weights in the dtype that it computes in, and buffers for one chunk."""

    def __init__(self, net: Any, dtype: torch.dtype, device: torch.device) -> None:
        inner, self.activation, outer = net
        self.inner, self.outer = ((layer.weight.to(dtype), layer.bias.to(dtype)) for layer in (inner, outer))
        self.scratch = Scratch(dtype, device)

    def hidden(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``(…, dim)`` → the hidden values ``(…, mult·dim)`` after and before the activation."""
        before = self.scratch.linear("before", values, *self.inner)
        after = self.scratch.take("hidden", *before.shape)
        return torch.ops.aten.gelu.out(before, approximate=self.activation.approximate, out=after), before

    def out(self, hidden: Tensor) -> Tensor:
        return self.scratch.linear("out", hidden, *self.outer)

    def through_activation(self, upstream: Tensor, before: Tensor) -> Tensor:
        """From the output's cotangent to that of ``before``; overwrites the hidden values."""
        inward = self.scratch.linear("hidden", upstream, self.outer[0].t())
        how = self.activation.approximate
        return torch.ops.aten.gelu_backward.grad_input(inward, before, approximate=how, grad_input=inward)

    def through_inner(self, upstream: Tensor) -> Tensor:
        return self.scratch.linear("out", upstream, self.inner[0].t())


def _over_tokens(upstream: Tensor) -> Tensor:
    """Sum over all but the last dimension, in fp32 at least."""
    return upstream.flatten(0, -2).sum(dim=0, dtype=torch.promote_types(upstream.dtype, torch.float32))


class PreNorm(nn.Module):
    """``fn(LayerNorm(x))``; the norm belongs to fn's pieces where fn comes in pieces."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def as_branch(self, kwargs: Mapping[str, Any]) -> Branch:
        offer = pieces_of(self.fn)
        return Branch(self, [self], kwargs) if offer is None else offer(kwargs, norm=self.norm)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.fn(self.norm(x), **kwargs)
