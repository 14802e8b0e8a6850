"""The end of a reversible language model: streams summed, normed, projected and compared, a chunk of tokens at a time.

Neither the sum of the streams nor its norm nor the logits exist as a whole. What is kept for backward besides the two
streams, which reversal needs anyhow, is the gradient of their sum; nothing where gradients wait for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..common.gradients import once_differentiable
from ..recompute.pieces import Replay, Totals, vector_jacobian_product
from ..recompute.reversal import Tape
from .linear_cross_entropy import (
    Rows,
    Settings,
    check,
    gradients_of_head,
    gradients_wait,
    reduced,
    run,
    scaled,
    share_of_each,
)


def reversible_cross_entropy(
    tape: Tape,
    y1: Tensor,
    y2: Tensor,
    norm: nn.Module,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Tensor:
    """``linear_cross_entropy(norm(y1 + y2), weight, labels, bias=bias, …)``, the mean, in less memory.

    tape and streams ``(b, n, d)``: what :meth:`ReversibleSequence.streams` returns. weight ``(V, d)``, labels
    ``(b, n)`` int64 → scalar in nats. norm: token-wise. To be called with gradients enabled. Raises what
    :func:`linear_cross_entropy` raises.
    """
    settings = check(y1.to(tape.dtype), weight, labels, bias, ignore_index, "mean", 0.0, chunk_size)
    labels = labels.reshape(-1)
    tensors = (y1, y2, labels, weight, bias, *norm.parameters())
    if not gradients_wait(settings, y1, weight):
        return _LossExit.apply(tape, settings, norm, *tensors)
    return reduced(settings, _LossExitOfTokens.apply(tape, settings, norm, Replay(y1), *tensors), labels)


class _NormedSum(Rows):
    """Rows ``norm(y1 + y2)``, made chunk by chunk; their gradient goes back through norm to the sum."""

    def __init__(self, tape: Tape, norm: nn.Module, y1: Tensor, y2: Tensor, needed: tuple[bool, ...]) -> None:
        self.streams = y1.flatten(0, -2), y2.flatten(0, -2)
        self.dtype, self.norm = tape.dtype, norm
        self.of_norm = Totals(list(norm.parameters()), needed[1:])
        self.of_sum = torch.empty_like(y1, memory_format=torch.contiguous_format) if needed[0] else None

    def take(self, chunk: slice) -> Tensor:
        first, second = (stream[chunk] for stream in self.streams)
        self.sum = (first + second).to(self.dtype).requires_grad_(self.of_sum is not None)
        with torch.enable_grad():
            self.normed = self.norm(self.sum)
        return self.normed.detach()

    def room(self, chunk: slice) -> Tensor | None:
        return torch.empty_like(self.normed) if self.normed.requires_grad else None

    def written(self, chunk: slice, gradient: Tensor) -> None:
        leaves = [*self.of_norm.leaves, *([] if self.of_sum is None else [self.sum])]
        found = vector_jacobian_product(self.normed, leaves, gradient)
        self.of_norm.add(found[: len(self.of_norm.leaves)], gradient)
        if self.of_sum is not None and found[-1] is not None:
            self.of_sum.flatten(0, -2)[chunk] = found[-1]
        del self.sum, self.normed


class _LossExit(torch.autograd.Function):
    """The mean: gradients in forward, as in ``linear_cross_entropy``."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        settings: Settings,
        norm: nn.Module,
        y1: Tensor,
        y2: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *norm_parameters: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        of_streams, of_norm = needs[3] or needs[4], needs[8:]
        share, early, late = share_of_each(settings, labels, torch.promote_types(y1.dtype, torch.float32))
        rows = _NormedSum(tape, norm, y1, y2, (of_streams, *of_norm))
        wanted = (of_streams or any(of_norm), needs[6], needs[7])
        losses, of_head = run(settings, rows, weight, bias, labels, early, wanted)
        ctx.tape = tape
        gradients = (rows.of_sum, *of_head, *rows.of_norm.gradients)
        ctx.dtypes = [t if t is None else t.dtype for t in (y1, weight, bias, *norm_parameters)]
        kept = (y1, y2) if of_streams and tape.rebuild else (None, None)
        ctx.save_for_backward(*kept, late, *gradients)
        return losses.sum() * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2, late, *gradients = ctx.saved_tensors
        of_sum, *others = scaled(gradients, grad_loss * late, ctx.dtypes)
        return None, None, None, *_begin(ctx.tape, y1, y2, of_sum), None, *others


class _LossExitOfTokens(torch.autograd.Function):
    """A loss per token: gradients wait for those that come in, so backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        settings: Settings,
        norm: nn.Module,
        replay: Replay,
        y1: Tensor,
        y2: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *norm_parameters: Tensor,
    ) -> Tensor:
        ctx.tape, ctx.settings, ctx.norm, ctx.replay = tape, settings, norm, replay
        rows = _NormedSum(tape, norm, y1, y2, (False, *(False for _ in norm_parameters)))
        with replay.first():
            losses, _ = run(settings, rows, weight, bias, labels)
        ctx.save_for_backward(y1, y2, labels, weight, bias, *replay.release())
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2, labels, weight, bias, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_streams, of_norm = needs[4] or needs[5], needs[9:]
        rows = _NormedSum(ctx.tape, ctx.norm, y1, y2, (of_streams, *of_norm))
        wanted = (of_streams or any(of_norm), needs[7], needs[8])
        with ctx.replay.again(kept):
            of_head = gradients_of_head(ctx.settings, rows, weight, bias, labels, grad_losses, wanted)
        of_both = _begin(ctx.tape, y1, y2, rows.of_sum)
        return None, None, None, None, *of_both, None, *of_head, *rows.of_norm.gradients


def _begin(tape: Tape, y1: Tensor, y2: Tensor, of_sum: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Start the chain's backward with the gradient of its streams' sum; the gradients of both."""
    if of_sum is None or not tape.rebuild:
        return of_sum, of_sum
    of_second = of_sum.clone()
    tape.begin(y1, y2, of_sum, of_second)
    return of_sum, of_second
