"""Sum gradients of leaves over the parts of a backward pass, in ``.grad`` itself where that cannot be observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..torch_internals.engine import accumulates
from ..torch_internals.hooks import node_has_hooks, tensor_has_hooks
from ..torch_internals.tensors import are_plain
from .autograd import creates_graph, vector_jacobian_product
from .dry_run import device_type
from .precision import full_dtype
from .products import add_product


def accumulator(leaf: Tensor) -> Tensor:
    """Return the tensor in which a backward pass sums ``leaf``'s gradient: its ``.grad`` where possible, else zeros.

    For the backward of an autograd Function that has ``leaf`` among its inputs and returns :func:`left_to_add` for it.
    A separate gradient would exist beside that of earlier batches until autograd adds the two. Megatron-LM calls this
    gradient accumulation fusion.

    ``.grad`` is added to where autograd would do so itself and the difference cannot be observed: in a ``.backward()``
    that reaches the leaf and creates no graph, without hooks on the leaf or on its accumulation node, which must see
    this pass's gradient alone (post-accumulate hooks see the sum, as always). It stays the same tensor. A pass that
    fails midway leaves a part of its gradient there.

    Limits: concurrent passes that share a leaf race, as PyTorch documents for its own. Hooks on the Function's node see
    only what is left to add. A loss computed from ``.grad`` itself finds it changed early. On a GPU, a leaf that
    several Functions share costs zeros of its size once, which autograd allocates for their sum.
    """
    if may_add_in_place(leaf) and not torch.is_grad_enabled() and not creates_graph() and _will_accumulate(leaf):
        assert leaf.grad is not None
        return leaf.grad
    return fresh_total(leaf)


def left_to_add(leaf: Tensor, total: Tensor) -> Tensor | None:
    """Return what a Function returns as ``leaf``'s gradient, once the ``total`` of :func:`accumulator` is complete."""
    if torch.compiler.is_compiling() or not leaf.is_leaf or total is not leaf.grad:
        return total.to(leaf.dtype)
    return _nothing(leaf)


def _nothing(leaf: Tensor) -> Tensor | None:
    # On devices with streams the engine synchronises at each gradient, so it gets one: zeros without memory.
    return None if device_type(leaf.device) == "cpu" else leaf.new_zeros(()).expand_as(leaf)


def fresh_total(leaf: Tensor) -> Tensor:
    """Return zeros in the leaf's shape, in fp32 at least."""
    return torch.zeros_like(leaf, dtype=full_dtype(leaf.dtype), memory_format=torch.contiguous_format)


def may_add_in_place(leaf: Tensor) -> bool:
    """Return True if, as far as is known before backward, :func:`accumulator` could return ``leaf.grad``."""
    if torch.compiler.is_compiling():
        return False
    grad = leaf.grad if leaf.is_leaf and leaf.requires_grad else None
    if grad is None or tensor_has_hooks(leaf):
        return False
    # Tensors of other types may do anything when added to; one with a graph may still be differentiated.
    plain = are_plain(leaf, grad) and all(t.layout == torch.strided for t in (leaf, grad))
    ours = plain and grad.is_contiguous() and not grad.requires_grad and not grad.is_inference()
    return ours and (grad.dtype, grad.device, grad.shape) == (full_dtype(leaf.dtype), leaf.device, leaf.shape)


def _will_accumulate(leaf: Tensor) -> bool:
    """Return True inside a ``.backward()`` that will add to ``leaf.grad`` without hooks."""
    node = get_gradient_edge(leaf).node
    return accumulates(node) and not node_has_hooks(node) and _on_default_stream(leaf.device)


def _on_default_stream(device: torch.device) -> bool:
    # Functions that share a leaf but not a stream would add to it at the same time.
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    return not torch.cuda.is_initialized() or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


class GradientSums:
    """Sums the gradients of leaves over the parts of one backward pass, in fp32 at least.

    A single complete gradient is kept as it is; a second one, a partial one or a product is added to what ``total``
    returns.

    Args:
        leaves: distinct leaves, for which an autograd Function returns :attr:`results`.
        needed: for each leaf whether its gradient is wanted. Others are not computed, and None.
        total: returns the tensor in which a leaf's gradient is summed: ``.grad`` itself where possible
            (:func:`accumulator`, only inside a backward pass), or zeros (:func:`fresh_total`, anywhere).
    """

    def __init__(
        self, leaves: Sequence[Tensor], needed: Sequence[bool], total: Callable[[Tensor], Tensor] = accumulator
    ) -> None:
        self._leaves, self._make_total = leaves, total
        self.wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        self._needed = set(self.wanted)
        self._first: dict[Tensor, Tensor] = {}
        self._totals: dict[Tensor, Tensor] = {}

    def wants(self, leaf: Tensor) -> bool:
        """Return whether the leaf's gradient is wanted."""
        return leaf in self._needed

    def total(self, leaf: Tensor) -> Tensor | None:
        """Return the tensor in which the leaf's gradient is summed, to be added to; None if it is not wanted."""
        if not self.wants(leaf):
            return None
        if leaf not in self._totals:
            self._totals[leaf] = self._make_total(leaf)
            if leaf in self._first:
                self._totals[leaf].add_(self._first.pop(leaf))
        return self._totals[leaf]

    def add(self, leaf: Tensor, grad: Tensor | None, place: Any = ..., *, beside: Tensor | None = None) -> None:
        """Add to a leaf's gradient, at ``place``. One that shares the memory of ``beside`` is copied, not kept."""
        if grad is None or leaf not in self._needed:
            return
        if place is ... and leaf not in self._totals and leaf not in self._first:
            shared = beside is not None and grad.untyped_storage() is beside.untyped_storage()
            self._first[leaf] = grad.clone() if shared else grad
        elif (total := self.total(leaf)) is not None:
            total[place].add_(grad)

    def add_product(self, weight: Tensor, upstream: Tensor, values: Tensor, place: Any = ...) -> None:
        """Add ``upstreamᵀ values``, over tokens, to the gradient of a linear layer's weight, at ``place``."""
        total = self.total(weight)
        if total is not None:
            add_product(total[place], upstream.flatten(0, -2), values.flatten(0, -2))

    def backward(self, value: Tensor, cotangent: Tensor, inputs: Sequence[Tensor] = ()) -> list[Tensor | None]:
        """Differentiate ``value``: add the gradients of the leaves and return those of ``inputs``."""
        found = vector_jacobian_product(value, [*inputs, *self.wanted], cotangent)
        for leaf in reversed(self.wanted):
            self.add(leaf, found.pop(), beside=cotangent)
        return found

    @property
    def results(self) -> list[Tensor | None]:
        """What backward returns for each leaf: the part of its gradient not yet in ``.grad``, in its dtype."""
        single = {leaf: gradient.to(leaf.dtype) for leaf, gradient in self._first.items()}
        summed = {leaf: left_to_add(leaf, total) for leaf, total in self._totals.items()}
        return [summed.get(leaf, single.get(leaf)) for leaf in self._leaves]
