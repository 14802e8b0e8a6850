"""The loss as one autograd Function over chunks of rows.

Gradients computed in forward take three products there and none in backward, which scales them in place or, if the
graph is retained, into copies. Gradients that wait for backward need only the inputs stored, but the logits are
computed again: four products in all. A gradient that is not needed costs neither its product nor its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import once_differentiable
from ..common.divided import active
from ..common.dry_run import each, working_on
from ..common.gradients import accumulator, fresh_total, left_to_add, may_add_in_place
from ..common.precision import full_dtype, full_precision
from ..recompute.replay import Replay
from ..torch_internals.engine import graph_is_kept
from .chunk import ChunkLoss, Settings
from .rows import Rows, RowSource


def chunked_loss(
    settings: Settings,
    source: RowSource,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the losses ``(N,)`` of rows with labels ``(N,)``, or their sum or mean; class_weights ``(V,)``."""
    # Inside a Function gradients are off whatever the caller chose, so whether any is wanted must be found out here.
    inputs = (weight, bias, *source.tensors)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    waits = not wanted or settings.reduction == "none" or gradients_wait(settings.product_dtype, source.shape, weight)
    replay = Replay(weight) if source.random and wanted and waits else None
    divided = active()
    settings = settings._replace(gradients_wait=waits, divided=divided)
    losses: Tensor = LinearCrossEntropy.apply(settings, source.make, replay, labels, class_weights, *inputs)
    return losses if divided is None or settings.reduction == "none" else divided.loss(losses)


class LinearCrossEntropy(torch.autograd.Function):
    """Computes the loss; differentiable in weight, bias and the tensors that the rows are made of."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        make: Callable[..., Rows],
        replay: Replay | None,
        labels: Tensor,
        class_weights: Tensor | None,
        *inputs: Any,
    ) -> Tensor:
        ctx.settings, ctx.make, ctx.replay = settings, make, replay
        needed = [need and not settings.gradients_wait for need in ctx.needs_input_grad[5:]]
        share, early, late = share_of_each(settings, labels, class_weights, inputs[0].dtype)
        with nullcontext() if replay is None else replay.first():
            losses, gradients = over_chunks(settings, make, (labels, class_weights), inputs, needed, early)
        if settings.gradients_wait:
            kept = () if replay is None else replay.release()
            ctx.save_for_backward(share, labels, class_weights, *inputs, *kept)
        else:
            ctx.dtypes = [x if x is None else x.dtype for x in inputs]
            ctx.save_for_backward(late, *gradients)
        return losses if settings.reduction == "none" else losses.sum() * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        factor, *others = ctx.saved_tensors
        needed, factor = ctx.needs_input_grad[5:], cotangent * factor
        if not ctx.settings.gradients_wait:
            # Unless the graph is retained the gradients are not used again: scaling in place spares a second (V, d).
            scale = torch.mul if torch.compiler.is_compiling() or graph_is_kept() else Tensor.mul_
            pairs = zip(others, ctx.dtypes, strict=True)
            return *[None] * 5, *(x if x is None else scale(x, factor).to(dtype) for x, dtype in pairs)
        labels, class_weights, *others = others
        inputs, kept = others[: len(needed)], others[len(needed) :]
        targets = labels, class_weights
        with nullcontext() if ctx.replay is None else ctx.replay.again(kept):
            _, gradients = over_chunks(ctx.settings, ctx.make, targets, inputs, needed, factor, accumulator)
        of_head = [g if g is None else left_to_add(x, g) for x, g in zip(inputs[:2], gradients[:2], strict=True)]
        return *[None] * 5, *of_head, *gradients[2:]


def over_chunks(
    settings: Settings,
    make: Callable[..., Rows],
    targets: tuple[Tensor, Tensor | None],
    inputs: Sequence[Any],
    needed: Sequence[bool],
    row_weight: Tensor,
    total: Callable[[Tensor], Tensor] = fresh_total,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return losses ``(N,)``, 0 where ignored, and gradients of ``sum(row_weight * losses)`` for the needed inputs.

    targets: labels and class weights. inputs: weight, bias, and the tensors that the rows are made of. row_weight:
    ``(N,)``, or one for all. total: returns the tensors that the gradients of weight and bias are added to, which are
    returned.
    """
    weight, bias, *made_of = inputs
    labels, class_weights = targets
    z_loss = z_loss_of_each(settings, labels, class_weights, weight.dtype)
    counted = labels != settings.ignore_index
    labels = labels.masked_fill(~counted, 0)
    losses = weight.new_empty(len(labels), dtype=full_dtype(weight.dtype))
    row_weight = torch.where(counted, row_weight, losses.new_zeros(()))
    chunks = even_chunks(len(labels), settings.chunk_size)
    rows = make(needed[2:], *made_of)
    with working_on("loss"), full_precision(weight.device):
        of_head = [total(x) if need else None for x, need in zip((weight, bias), needed, strict=False)]
        most = chunks[0].stop if chunks else 1
        chunk_loss = ChunkLoss(settings, weight, bias, of_head, most, class_weights, z_loss)
        for chunk in each(chunks):
            hidden = rows.forward(chunk)
            losses[chunk] = chunk_loss.losses(hidden, labels[chunk])
            # One branch after the other: under Python 3.13 PyTorch's compiler cannot trace nested ones here.
            gradient = None
            if any(needed):
                gradient = chunk_loss.add_gradients(hidden, labels[chunk], row_weight[chunk], any(needed[2:]))
            if gradient is not None:
                rows.backward(chunk, gradient)
            del gradient
    # Not in place: in PyTorch 2.11 a compiled Function that returns a tensor under two names loses its cotangent.
    return losses.masked_fill(~counted, 0), [*of_head, *rows.gradients()]


def even_chunks(tokens: int, chunk_size: int) -> list[slice]:
    """Return as few chunks as the size allows, of equal length, so that no short one is left over."""
    count = max(1, -(-tokens // chunk_size))
    size = max(1, -(-tokens // count))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def gradients_wait(product_dtype: torch.dtype, shape: Sequence[int], weight: Tensor) -> bool:
    """Return whether gradients wait for backward though the loss is a scalar; shape: of hidden vectors ``(…, d)``.

    They do if the weight's gradient is larger than the hidden vectors' and the weight has a ``.grad`` that backward can
    add to: a gradient made in forward would exist beside that. Not with products in fp16, to which a loss scaler's
    factor would be applied after rounding (see :func:`share_of_each`).
    """
    large = weight.numel() > math.prod(shape) and product_dtype != torch.float16
    return large and may_add_in_place(weight)


def share_of_each(
    settings: Settings, labels: Tensor, class_weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor of the sum of losses (one over the weight of the valid labels, or one), and its two parts.

    Gradients are multiplied by the first part, in [1/2, 1], when they are computed and by the second, a power of two,
    in backward. So they are rounded once, and gradients kept in fp16 do not lose small values before a loss scaler's
    factor is applied.
    """
    one = labels.new_ones((), dtype=full_dtype(dtype))
    if settings.reduction != "mean":
        return one, one, one
    share = one / _total_weight(settings, labels, class_weights, dtype)
    early, _ = torch.frexp(share)
    return share, early, share / early


def z_loss_of_each(
    settings: Settings, labels: Tensor, class_weights: Tensor | None, dtype: torch.dtype
) -> Tensor | float | None:
    """Return the factor of each squared log-sum-exp that gives all of them equal weight in a weighted mean."""
    if not settings.z_loss:
        return None
    if class_weights is None or settings.reduction != "mean":
        return settings.z_loss
    total, number = (_total_weight(settings, labels, weights, dtype) for weights in (class_weights, None))
    return settings.z_loss * total / number


def _total_weight(settings: Settings, labels: Tensor, class_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the total weight of the valid labels, without class weights their number; 1 if it would be 0."""
    counted = labels != settings.ignore_index
    of_all = (lambda x: x) if settings.divided is None else settings.divided.sum
    if class_weights is None:
        return of_all(counted.sum()).clamp_min(1)
    of_labels = class_weights.to(full_dtype(dtype))[labels.masked_fill(~counted, 0)]
    total = of_all(of_labels.masked_fill(~counted, 0).sum())
    return total.masked_fill(total == 0, 1)
