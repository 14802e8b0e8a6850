"""Helpers of hand-written backward passes: refusal of second derivatives, and gradients of single pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .precision import full_precision

_creates_graph: ContextVar[bool] = ContextVar("creates_graph", default=False)


def creates_graph() -> bool:
    """Return True inside a backward pass with ``create_graph=True``."""
    return _creates_graph.get()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the second derivative of an autograd Function an error.

    PyTorch's decorator of this name returns gradients without a graph if the incoming ones have none, so a penalty on
    the gradient would silently have no effect.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return tuple(backward(ctx, *incoming))
        before = _creates_graph.set(True)
        try:
            with torch.no_grad():
                gradients = backward(ctx, *incoming)
        finally:
            _creates_graph.reset(before)
        name = backward.__qualname__.split(".")[0].removeprefix("_")
        return tuple(g if g is None else _Refusal.apply(g.detach().requires_grad_(), name) for g in gradients)

    return wrapped


class _Refusal(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{ctx.name} is differentiable once: its gradients cannot be differentiated again")


def vector_jacobian_product(value: Tensor, wanted: Sequence[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    """Return gradients of ``wanted`` as an ordinary backward computes them; None for tensors that take no part.

    An ordinary backward runs outside autocast, so that what the forward kept in fp32 is differentiated in fp32.
    """
    asked = [tensor for tensor in wanted if tensor.requires_grad and value.requires_grad]
    if not asked:
        return [None] * len(wanted)
    with full_precision(value.device):
        found = iter(torch.autograd.grad(value, asked, cotangent, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in wanted]
