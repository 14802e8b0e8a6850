"""PyTorch's linear layer, computed by the faster of its CPU libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..common.gradients import accumulator, left_to_add
from ..common.products import MULTIPLE, add_product, few_rows, linear_into, worthwhile


class Linear(nn.Linear):
    """``x @ weightᵀ + bias``, an ``nn.Linear`` in all but speed.

    Where oneDNN is the faster library (see ``functional/products.py``) fp32 products go through it, forward and
    backward; second derivatives and everything else are left to PyTorch. No forward-mode differentiation there.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = input, self.weight, self.bias
        if not _suits(x, weight):
            return super().forward(x)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return _Linear.apply(x, weight, bias)
        return _product(x, weight, bias)


def is_plain_linear(module: nn.Module) -> bool:
    """Is this a linear layer that computes nothing but its product?"""
    return type(module) in (nn.Linear, Linear)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        upstream = grad_out.reshape(-1, grad_out.shape[-1])
        if torch.is_grad_enabled():  # create_graph: PyTorch's operators can be differentiated again
            return grad_out @ weight, upstream.t() @ x.reshape(-1, x.shape[-1]), upstream.sum(0) if of_bias else None
        grad_x = _product(grad_out, weight.t()) if of_x else None
        grad_weight = None
        if of_weight:
            total = accumulator(weight)
            add_product(total, upstream, x.reshape(-1, x.shape[-1]))
            grad_weight = left_to_add(weight, total)
        return grad_x, grad_weight, upstream.sum(0) if of_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) < MULTIPLE:
        out = few_rows(rows, weight, bias)
    else:
        out = linear_into(rows.new_empty(len(rows), len(weight)), rows, weight, bias)
    return out.view(*x.shape[:-1], len(weight))


def _suits(x: Tensor, weight: Tensor) -> bool:
    # Tensors of other types bring their own products with them; functorch and autocast ask PyTorch's operators.
    if not all(type(t) in (Tensor, nn.Parameter, FakeTensor) for t in (x, weight)) or x.dim() < 2:
        return False
    if torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu"):
        return False
    return worthwhile(x.numel() // max(1, x.shape[-1]), x, weight)
