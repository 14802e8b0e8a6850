"""Rebuild a step's input from its output in backward, so that no activation is stored.

Two streams, ``y1 = x1 + f(x2)`` and ``y2 = x2 + g(y1)`` (Gomez et al., "The reversible residual network", 2017,
arXiv:1707.04585). A block is the same step twice: ``(a, b) → (b, a + f(b))``.

Backward has no use for the a of the first step, and that of the last is kept in the place of the sum, which nobody
needs once the loss has seen it. So these two need no values of their branches again: what is written by hand leaves out
the last product.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.autograd import once_differentiable
from ..common.errors import require
from ..common.precision import full_dtype
from ..torch_internals.engine import version
from ..torch_internals.tensors import is_fake, memory_is_shared
from .pieces import Branch, Index, adding_to, branch_of, refuse_sharded, slice_for, value_of
from .replay import Replay


class Grid:
    """Rounds to multiples of ``step``, a power of two. Raises ValueError for another step.

    Sums of such multiples are exact in fp32 while they stay below ``2**24 · step``, so a subtraction undoes an addition
    bit for bit.
    """

    def __init__(self, step: float) -> None:
        require(step > 0 and math.frexp(step)[0] == 0.5, "grid", "a power of two", step)
        self.step = step

    def round(self, value: Tensor) -> Tensor:
        """Return ``value`` rounded, as a new tensor in at least fp32."""
        wide = value.detach().to(full_dtype(value.dtype))
        return torch.mul(wide, 1 / self.step).round_().mul_(self.step)

    def limit(self, dtype: torch.dtype) -> float:
        """Return the magnitude below which ``dtype`` represents every multiple of ``step``."""
        return self.step * 2 / torch.finfo(dtype).eps


class OntoGrid(torch.autograd.Function):
    """Rounds to the grid; its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: Grid) -> Tensor:
        ctx.dtype = value.dtype
        return grid.round(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return cotangent.to(ctx.dtype), None


class Chain:
    """Holds what the steps of one forward call share: the rebuilt streams, and the gradients that they may overwrite.

    dtype: of the chain's input and output. rebuild: backward will rebuild the streams. in_pieces: branches may be
    computed in pieces. watched: hooks may see the streams between the steps, and so their gradients.
    """

    def __init__(self, grid: Grid | None, dtype: torch.dtype, rebuild: bool, in_pieces: bool) -> None:
        self.grid, self.dtype, self.rebuild, self.in_pieces = grid, dtype, rebuild, in_pieces
        # Of the step that backward has come to: b, a + f(b) and False, or b, a and True.
        self.streams: tuple[Tensor, Tensor, bool] | None = None
        self.steps, self.watched = 0, False
        self._last_a: tuple[Tensor, int] | None = None
        self._own: list[weakref.ref[torch.UntypedStorage]] = []
        self._peaks: list[Tensor] = []
        self._left: list[tuple[weakref.ref[torch.UntypedStorage], int]] = []

    def onto_grid(self, value: Tensor) -> Tensor:
        return value if self.grid is None else self.grid.round(value)

    def leave(self, *streams: Tensor) -> None:
        """Record the streams that a block returns."""
        if not self.rebuild:
            return
        self._left = [(weakref.ref(t.untyped_storage()), version(t)) for t in streams]

    def enter(self, *streams: Tensor) -> None:
        """Raise if the streams were replaced or changed between two blocks, since they could not be rebuilt."""
        pairs = zip(self._left, streams, strict=False)
        untouched = all(left() is t.untyped_storage() and count == version(t) for (left, count), t in pairs)
        expected = "to reach the next block unchanged (reversible=False allows any)"
        require(untouched, "a reversible block's output", expected, "other values, from a hook perhaps")

    def keep(self, a: Tensor | None) -> None:
        """Keep the last step's ``a`` so far, with its version, for :meth:`kept`."""
        self._last_a = None if a is None or not self.rebuild else (a.detach(), version(a))

    def kept(self) -> Tensor | None:
        """Hand over the last step's ``a`` if the chain made it. Raises ValueError if it was changed since."""
        if self._last_a is None:
            return None
        (a, before), self._last_a = self._last_a, None
        expected = "to be left unchanged (reversible=False allows any)"
        require(version(a) == before, "a reversible block's input", expected, "other values, from a hook perhaps")
        return a

    def watch(self, stream: Tensor) -> None:
        """Remember the stream's largest magnitude, for :meth:`report`."""
        if self.grid is not None and stream.numel() and not is_fake(stream):
            self._peaks.append(torch.linalg.vector_norm(stream.detach(), math.inf))

    def report(self, dtype: torch.dtype) -> None:
        """Warn when a stream left the range in which its additions are exact."""
        if self.grid is None or not self._peaks:
            return
        peak, limit = float(torch.stack(self._peaks).max()), self.grid.limit(dtype)
        self._peaks.clear()
        if peak >= limit:
            warnings.warn(
                f"a stream reached {peak:.3g}, outside the exact range of {limit:.3g} (grid {self.grid.step:.3g}): "
                "reversal is subject to ordinary rounding here; a larger grid widens the range",
                stacklevel=3,
            )

    def begin(self, b: Tensor, other: Tensor, is_a: bool, *gradients: Tensor) -> None:
        """Start backward at the last step, given its b and a, or their sum; steps may overwrite ``gradients``."""
        # New tensor objects, so that any other tensor that shares their memory belongs to someone else.
        self.streams = (b.detach(), other.detach(), is_a)
        self.own(*gradients)

    def own(self, *gradients: Tensor) -> None:
        """Mark gradients as made by the chain, so that the next step may overwrite them."""
        self._own = [weakref.ref(g.untyped_storage()) for g in gradients]

    def owns(self, gradient: Tensor) -> bool:
        if self.watched or memory_is_shared(gradient):
            return False
        storage = gradient.untyped_storage()
        return any(own() is storage for own in self._own)

    def overwritable(self, gradient: Tensor) -> Tensor:
        """Return ``gradient`` if it is the chain's own, else a copy."""
        if self.owns(gradient) and gradient.is_contiguous():
            return gradient
        return gradient.clone(memory_format=torch.contiguous_format)


class _Step(torch.autograd.Function):
    """``(a, b) → (b, a + branch(b))``. Stores neither stream if the chain rebuilds them, b otherwise."""

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, branch: Branch, replay: Replay, a: Tensor, b: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.chain, ctx.branch, ctx.replay, ctx.inputs = chain, branch, replay, len(inputs)
        ctx.number, chain.steps = chain.steps, chain.steps + 1
        chain.keep(None)
        c = a.clone(memory_format=torch.contiguous_format)

        def add(index: Index, value: Tensor) -> None:
            slice_for(value, c, index).add_(chain.onto_grid(value))

        with replay.first():
            branch.run(b.to(chain.dtype), inputs, add)
        ctx.save_for_backward(None if chain.rebuild else b, *inputs, *replay.release())
        # The a of the first two steps is the chain's input, which is not the chain's to keep.
        chain.keep(a if ctx.number > 1 else None)
        # Detached, b is an output of its own and no view: hooks that FSDP puts on outputs refuse views.
        return b.detach(), c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_b: Tensor, grad_c: Tensor) -> tuple[Tensor | None, ...]:
        chain, branch = ctx.chain, ctx.branch
        b, *rest = ctx.saved_tensors
        inputs, kept = rest[: ctx.inputs], rest[ctx.inputs :]
        needs_streams = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        a, rebuild = None, False
        if chain.rebuild:
            assert chain.streams is not None, "a step of a reversible chain ran backward before its end did"
            # Unless it is a already, the second is a + f(b), from which the pieces are subtracted below.
            b, a, is_a = chain.streams
            chain.streams = None
            rebuild = needs_streams and ctx.number > 0 and not is_a
            if rebuild and memory_is_shared(a):
                # A hook or a module kept what it saw, or a graph is retained for another pass.
                a = a.clone()
        total = chain.overwritable(grad_b) if needs_streams else None

        def subtract(index: Index, value: Tensor) -> None:
            assert a is not None
            a[index].sub_(chain.onto_grid(value))

        with ctx.replay.again(kept):
            grads = branch.differentiate(
                b.to(chain.dtype),
                inputs,
                ctx.needs_input_grad[5:],
                grad_c,
                subtract if rebuild else None,
                adding_to(total),
            )
        if total is None:
            return (None, None, None, None, None, *grads)
        chain.streams = None if ctx.number == 0 or a is None else (a, b, False)
        chain.own(*([grad_c] if chain.owns(grad_c) else []), total)
        return (None, None, None, grad_c, total, *grads)


class ChainEnd(torch.autograd.Function):
    """Returns the first stream. Its gradient, that of the streams' sum and so of both, starts the chain's backward.

    Saves the first stream, which is the last step's b, and that step's a or, if the chain did not make it, the second.
    spare: the gradient is not shared, so the steps may overwrite it.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, spare: bool, y1: Tensor, y2: Tensor) -> Tensor:
        ctx.chain, ctx.spare = chain, spare
        a = chain.kept()
        ctx.is_a = a is not None
        ctx.save_for_backward(*((y1, y2 if a is None else a) if chain.rebuild else ()))
        return y1.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor) -> tuple[None, None, Tensor, Tensor]:
        own = (of_sum, of_sum.clone()) if ctx.spare and ctx.chain.rebuild else ()
        if ctx.chain.rebuild:
            ctx.chain.begin(*ctx.saved_tensors, ctx.is_a, *own)
        return None, None, *(own or (of_sum, of_sum))


def advance(module: nn.Module, chain: Chain, a: Tensor, b: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return ``(b, a + module(b))``. The sum is the same bit for bit whether or not backward will rebuild it."""
    # Nothing that a compiler follows is rebuilt, and a module asked for pieces has them in its own forward.
    in_pieces = chain.in_pieces and not torch.compiler.is_compiling()
    branch = branch_of(module, b, kwargs) if in_pieces else None
    if branch is not None and branch.single_piece:
        if not chain.rebuild:
            branch = None
        elif chain.grid is not None:
            # Gradients on the grid are those of reversible=False, bit for bit, which come through autograd.
            branch = Branch(module, kwargs)
    if branch is not None:
        refuse_sharded(module)
        streams: tuple[Tensor, Tensor] = _Step.apply(chain, branch, Replay(b), a, b, *branch.bound())
        return streams
    value = value_of(module, b.to(chain.dtype), kwargs)
    if not torch.compiler.is_compiling():
        slice_for(value, a, (...,))
    return b, (a + (value if chain.grid is None else OntoGrid.apply(value, chain.grid))).to(a.dtype)
