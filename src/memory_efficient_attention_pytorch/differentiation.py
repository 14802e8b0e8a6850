"""Gradients that cannot be differentiated again say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the second derivative of an autograd Function an error.

    PyTorch's decorator of this name returns gradients without a graph if the incoming ones have none, so that a penalty
    on the gradient would count for nothing and nobody would know.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        if not torch.is_grad_enabled():
            return gradients
        name = backward.__qualname__.split(".")[0].removeprefix("_")
        message = f"{name} is differentiable once: its gradients cannot be differentiated again"
        refusal = torch._C._functions.DelayedError(message.encode(), len(gradients))
        outgoing = [g if g is None else g.detach().requires_grad_() for g in gradients]
        return refusal(*outgoing)  # type: ignore[arg-type]

    return wrapped
