"""What the backward passes of this package share: they differentiate once, and add to a leaf's gradient in place."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import Node, get_gradient_edge

# Is the pass at work one of create_graph=True? Inside it gradients are off, so that nobody could tell.
_creates_graph: ContextVar[bool] = ContextVar("creates_graph", default=False)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the second derivative of an autograd Function an error.

    PyTorch's decorator of this name returns gradients without a graph if the incoming ones have none, so that a penalty
    on the gradient would count for nothing and nobody would know.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *incoming)
        before = _creates_graph.set(True)
        try:
            with torch.no_grad():
                gradients = backward(ctx, *incoming)
        finally:
            _creates_graph.reset(before)
        name = backward.__qualname__.split(".")[0].removeprefix("_")
        message = f"{name} is differentiable once: its gradients cannot be differentiated again"
        refusal = torch._C._functions.DelayedError(message.encode(), len(gradients))
        outgoing = [g if g is None else g.detach().requires_grad_() for g in gradients]
        return refusal(*outgoing)  # type: ignore[arg-type]

    return wrapped


def accumulator(leaf: Tensor) -> Tensor:
    """Where a backward pass gathers the gradient of ``leaf``: its ``.grad`` if that can be added to, else zeros.

    To be called in the backward of an autograd Function that has ``leaf`` among its inputs; what this Function returns
    for it is :func:`left_to_add`. A gradient made apart would exist beside the one of the batches before until autograd
    adds the two. Megatron-LM calls this gradient accumulation fusion.

    ``.grad`` is added to where autograd is about to do so anyhow, and nobody would see the difference: in a
    ``.backward()`` that reaches the leaf and makes no graph, without hooks on the leaf or on the node that accumulates,
    which are to see this pass's gradient alone (post-accumulate hooks see the sum, as always). It is the same tensor
    throughout, so views of it, or of which it is one, stay what they are. A pass that fails midway leaves a part of its
    gradient there, as it leaves some leaves with and some without theirs in any case.

    Limits: passes that run at the same time and share a leaf race, as they do by PyTorch's own account. Hooks on the
    Function's own node see what is left to add. A loss that is computed from ``.grad`` itself finds it changed early.
    On a GPU a leaf that several Functions share gets zeros of its size once, which autograd makes of their sum.
    """
    if may_add_in_place(leaf) and not torch.is_grad_enabled() and not _creates_graph.get() and _will_accumulate(leaf):
        assert leaf.grad is not None
        return leaf.grad
    return fresh_total(leaf)


def left_to_add(leaf: Tensor, total: Tensor) -> Tensor | None:
    """What a Function returns as the gradient of ``leaf``, ``total`` being what :func:`accumulator` gave, filled."""
    if torch.compiler.is_compiling() or not leaf.is_leaf or total is not leaf.grad:
        return total.to(leaf.dtype)
    return _nothing(leaf)


def _nothing(leaf: Tensor) -> Tensor | None:
    # A device's streams wait for each other at what the engine hands on, so it gets something: zeros without memory.
    return None if leaf.device.type == "cpu" else leaf.new_zeros(()).expand_as(leaf)


def fresh_total(leaf: Tensor) -> Tensor:
    """Zeros in the leaf's shape, in fp32 at least."""
    return torch.zeros_like(leaf, dtype=_total_dtype(leaf), memory_format=torch.contiguous_format)


def may_add_in_place(leaf: Tensor) -> bool:
    """Has ``leaf`` a gradient that :func:`accumulator` could give, as far as is known before backward?"""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    grad = leaf.grad if leaf.is_leaf and leaf.requires_grad else None
    if grad is None or leaf._backward_hooks:
        return False
    # Tensors of other types may do anything when added to; one with a graph is somebody's to differentiate.
    plain = all(type(t) in (Tensor, nn.Parameter, FakeTensor) and t.layout == torch.strided for t in (leaf, grad))
    ours = plain and grad.is_contiguous() and not grad.requires_grad and not grad.is_inference()
    return ours and (grad.dtype, grad.device, grad.shape) == (_total_dtype(leaf), leaf.device, leaf.shape)


def _will_accumulate(leaf: Tensor) -> bool:
    """Is a ``.backward()`` at work that will add to ``leaf.grad``, with nobody watching?"""
    node = get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node) and not _watched(node) and _on_default_stream(leaf.device)
    except RuntimeError:  # there is no pass, or it is one of torch.autograd.grad
        return False


def _watched(node: Node) -> bool:
    """Have hooks been registered on the node itself?"""
    # Nothing lists them, but a new one is put into one dictionary with the others.
    for register in (node.register_prehook, node.register_hook):
        handle: Any = register(lambda *_: None)
        others = len(handle.hooks_dict_ref()) - 1
        handle.remove()
        if others:
            return True
    return False


def _on_default_stream(device: torch.device) -> bool:
    # Functions that share a leaf but not a stream would add to it at the same time.
    if device.type in ("cpu", "meta"):
        return True
    if device.type != "cuda":
        return False
    return not torch.cuda.is_initialized() or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def _total_dtype(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)
