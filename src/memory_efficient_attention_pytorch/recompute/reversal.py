"""Reversal: a step's backward rebuilds its input from its output, so no activation is stored.

Two streams, ``y1 = x1 + f(x2)`` and ``y2 = x2 + g(y1)`` (Gomez et al., "The reversible residual network", 2017,
arXiv:1707.04585). A block is the same step twice: ``(a, b) → (b, a + f(b))``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..common.dry_run import working_on
from ..common.errors import require
from ..common.gradients import once_differentiable
from .pieces import Branch, Index, Replay, branch_of, refuse_sharded


class Grid:
    """Rounding to multiples of ``step``, a power of two.

    Sums of such multiples are exact in fp32 while they stay below ``2**24 · step``, so a subtraction undoes an addition
    bit for bit.
    """

    def __init__(self, step: float) -> None:
        require(step > 0 and math.frexp(step)[0] == 0.5, "grid", "a power of two", step)
        self.step = step

    def round(self, value: Tensor) -> Tensor:
        """``value`` in at least fp32, on the grid; a new tensor."""
        wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        return torch.mul(wide, 1 / self.step).round_().mul_(self.step)

    def limit(self, dtype: torch.dtype) -> float:
        """Below this magnitude every multiple of ``step`` is a number of ``dtype``."""
        return self.step * 2 / torch.finfo(dtype).eps


class _OntoGrid(torch.autograd.Function):
    """Rounding whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: Grid) -> Tensor:
        ctx.dtype = value.dtype
        return grid.round(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent.to(ctx.dtype), None


class Tape:
    """What one forward call's steps share: the rebuilt streams and the gradients that they may overwrite."""

    def __init__(self, grid: Grid | None, dtype: torch.dtype, rebuild: bool, in_pieces: bool) -> None:
        self.grid, self.dtype, self.rebuild, self.in_pieces = grid, dtype, rebuild, in_pieces
        self.streams: tuple[Tensor, Tensor] | None = None
        self.started = False
        self.handed: set[int] = set()
        self.peaks: list[Tensor] = []
        self.latest: list[tuple[int, int]] = []

    def onto_grid(self, value: Tensor) -> Tensor:
        return value if self.grid is None else self.grid.round(value)

    def leave(self, *streams: Tensor) -> None:
        """Note the streams that a step returns."""
        self.latest = self._marks(streams)

    def enter(self, *streams: Tensor) -> None:
        """Raise where something between two steps put other values in their place: they could not be rebuilt."""
        untouched = not self.latest or self._marks(streams) == self.latest
        require(
            untouched or not self.rebuild,
            "a reversible block's output",
            "to reach the next block unchanged (reversible=False allows any)",
            "other values, from a hook perhaps",
        )

    @staticmethod
    def _marks(streams: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(t.untyped_storage()._cdata, 0 if t.is_inference() else t._version) for t in streams]

    def watch(self, stream: Tensor) -> None:
        """Remember the stream's largest magnitude, for :meth:`report`."""
        if self.grid is not None and not isinstance(stream, FakeTensor):
            self.peaks.append(torch.linalg.vector_norm(stream.detach(), math.inf))

    def report(self, dtype: torch.dtype) -> None:
        """Warn when a stream left the range in which its additions are exact."""
        if self.grid is None or not self.peaks:
            return
        peak, limit = float(torch.stack(self.peaks).max()), self.grid.limit(dtype)
        self.peaks.clear()
        if peak >= limit:
            warnings.warn(
                f"a stream reached {peak:.3g}, outside the exact range of {limit:.3g} (grid {self.grid.step:.3g}): "
                "reversal is subject to ordinary rounding here; a larger grid widens the range",
                stacklevel=3,
            )

    def take(self, gradient: Tensor) -> Tensor:
        """``gradient`` if a step of this chain made it, else a copy: what came from outside is not ours to change."""
        mine = gradient.untyped_storage()._cdata in self.handed and gradient.is_contiguous()
        return gradient if mine else gradient.clone(memory_format=torch.contiguous_format)

    def begin(self, y1: Tensor, y2: Tensor, *gradients: Tensor) -> None:
        """Start backward from the last block's output. ``gradients``: those that the steps may overwrite."""
        if torch._C._autograd._get_current_graph_task_keep_graph():
            y1, y2 = y1.clone(), y2.clone()
        self.streams = (y1, y2)
        self.hand(*gradients)

    def hand(self, *gradients: Tensor | None) -> None:
        self.handed = {g.untyped_storage()._cdata for g in gradients if g is not None}


class _Step(torch.autograd.Function):
    """``(a, b) → (b, a + branch(b))``, keeping neither; b, if the tape is not to rebuild; attentions, where asked."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, branch: Branch, replay: Replay, a: Tensor, b: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.tape, ctx.branch, ctx.replay, ctx.inputs = tape, branch, replay, len(inputs)
        ctx.first, tape.started = not tape.started, True
        c = a.clone(memory_format=torch.contiguous_format)

        def add(index: Index, value: Tensor) -> None:
            c[index].add_(tape.onto_grid(value))

        with replay.first(), working_on(branch.owner):
            branch.run(b.to(tape.dtype), inputs, add)
        ctx.save_for_backward(None if tape.rebuild else b, *inputs, *replay.release())
        # Detached, b is an output of its own and no view: hooks that FSDP puts on outputs refuse views.
        return b.detach(), c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_b: Tensor, grad_c: Tensor) -> tuple[Tensor | None, ...]:
        tape, branch = ctx.tape, ctx.branch
        b, *rest = ctx.saved_tensors
        inputs, kept = rest[: ctx.inputs], rest[ctx.inputs :]
        c = None
        if tape.rebuild:
            assert tape.streams is not None, "a step of a reversible chain ran backward before its end did"
            b, c = tape.streams
        needs_streams = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        mine = grad_c.untyped_storage()._cdata in tape.handed
        total = tape.take(grad_b) if needs_streams else None
        tape.streams = None

        def subtract(index: Index, value: Tensor) -> None:
            assert c is not None
            c[index].sub_(tape.onto_grid(value))

        def add_gradient(index: Index, value: Tensor) -> None:
            assert total is not None
            total[index].add_(value)

        with ctx.replay.again(kept), working_on(branch.owner):
            grads = branch.differentiate(
                b.to(tape.dtype),
                inputs,
                ctx.needs_input_grad[5:],
                grad_c,
                subtract if needs_streams and tape.rebuild else None,
                add_gradient if needs_streams else None,
            )
        if not needs_streams:
            return (None, None, None, None, None, *grads)
        tape.streams = None if ctx.first or c is None else (c, b)
        tape.hand(grad_c if mine else None, total)
        return (None, None, None, grad_c, total, *grads)


class _Exit(torch.autograd.Function):
    """The sum of the two streams, which it keeps: backward starts from them."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, y1: Tensor, y2: Tensor) -> Tensor:
        ctx.tape = tape
        ctx.save_for_backward(y1, y2)
        return (y1 + y2).to(tape.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        y1, y2 = ctx.saved_tensors
        gradient = gradient.to(y1.dtype)
        ctx.tape.begin(y1, y2)
        return None, gradient, gradient


def _advance(module: nn.Module, tape: Tape, a: Tensor, b: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``(a, b) → (b, a + module(b))``. The sum is the same bit for bit whether backward will rebuild it or not."""
    branch = branch_of(module, kwargs) if tape.in_pieces else None
    if branch is not None and (tape.rebuild or not branch.single_piece):
        refuse_sharded(module)
        return _Step.apply(tape, branch, Replay(b), a, b, *branch.bound())
    value = module(b.to(tape.dtype), **kwargs)
    return b, a + (value if tape.grid is None else _OntoGrid.apply(value, tape.grid))
