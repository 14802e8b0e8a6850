"""Compute a residual branch as a sum of pieces, each recomputed and differentiated on its own.

Each piece reads a slice of the branch's input and adds to a slice of its output. So a branch can be added to a stream
in place, subtracted from it in place, and, since the cotangent is known, recomputed and differentiated in one pass: a
piece's intermediate values live only while that piece runs, and nothing is recomputed twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.autograd import once_differentiable
from ..common.dry_run import each, working_on
from ..common.errors import require
from ..common.gradients import GradientSums
from ..common.parameters import SeenBuffers, SeenHooks, SeenModes, SeenParameters
from ..torch_internals.engine import version
from .by_hand import reason_against
from .replay import Replay

Index = tuple[Any, ...]
Add = Callable[[Index, Tensor], object]


class Branch:
    """A module with its norm, if any, and keyword arguments, computed in pieces over slices of its input.

    A module offers pieces by a method ``as_branch(x, kwargs, norm=None)`` that returns one of these, and that
    :class:`ReversibleSequence`, :class:`PreNorm` and the planner ask for. It has to stand in for ``forward``, which
    pieces do not call. Dropout, autocast, buffers and keyword arguments are taken care of; they reach each piece whole.
    A subclass says by :meth:`slices` where the pieces are, and sets

    - ``single_piece``: all of it at once (the default, True). False where there are several pieces.
    - ``overlapping``: several pieces add to the same slice of the output (False).

    Args:
        module: maps a slice of x to what is added to the same slice of the output. Not the one whose ``as_branch`` this
            is, if its ``forward`` goes through :func:`apply_piecewise`.
        kwargs: its keyword arguments.
        norm: applied to each slice before it.

    ``inputs`` are the tensors besides x that may be differentiated: those among the keyword arguments (nested ones
    too), then the parameters. They are handed to an autograd Function, which keeps them; the branch itself keeps
    only buffers, which its modules may change in forward.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memory_efficient_attention_pytorch.recompute import Branch, apply_piecewise
        >>> class EachSequence(Branch):
        ...     single_piece = False
        ...     def slices(self, x):
        ...         return [(slice(i, i + 1),) for i in range(len(x))]
        >>> x = torch.randn(4, 8, 100, requires_grad=True)
        >>> apply_piecewise(EachSequence(nn.Conv1d(8, 8, 3, padding=1), {}), x).sum().backward()
        >>> x.grad.shape
        torch.Size([4, 8, 100])
    """

    overlapping = False
    single_piece = True

    def __init__(self, module: nn.Module, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> None:
        self.module: Any = module
        self.norm = norm
        holders = [module] if norm is None else [norm, module]
        self._tensors: list[Tensor] = []

        def note(leaf: Any) -> Any:
            if isinstance(leaf, nn.Module):
                holders.append(leaf)
            if not isinstance(leaf, Tensor):
                return leaf
            self._tensors.append(leaf)
            return _Place(len(self._tensors) - 1)

        self._kwargs = _map_leaves(note, dict(kwargs))
        self._count, self._holders = len(self._tensors), holders

    def bound(self) -> tuple[Tensor, ...]:
        """Record the state that :meth:`run` will see next, and return ``inputs``, which are released."""
        tensors, self._tensors = self._tensors, []
        self._parameters = SeenParameters(self._holders)
        # Without gradients there is no repetition.
        repeated = self._holders if torch.is_grad_enabled() else ()
        self._buffers, self._modes, self._hooks = SeenBuffers(repeated), SeenModes(repeated), SeenHooks(repeated)
        return *tensors, *self._parameters.take()

    def kwargs(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """Return the keyword arguments, with tensors from ``inputs``."""
        return dict(_map_leaves(lambda leaf: inputs[leaf.number] if isinstance(leaf, _Place) else leaf, self._kwargs))

    def slices(self, x: Tensor) -> Sequence[Index]:
        """The slices of x, and of the output, that the pieces read and add to: tuples that index it."""
        return [(...,)]

    def allocate(self, x: Tensor, value: Tensor) -> Tensor:
        """An output to which the pieces, of which ``value`` is the first, are copied, or added where they overlap.

        Of several pieces it has the shape of x; others are for a subclass to say.
        """
        if self.overlapping:
            return torch.zeros_like(x, dtype=value.dtype)
        return torch.empty_like(value) if self.single_piece else torch.empty_like(x, dtype=value.dtype)

    def run(self, x: Tensor, inputs: Sequence[Tensor], add: Add) -> None:
        """Compute every piece once and pass it to ``add(index, value)``."""
        with self._working(inputs), self._buffers.watched(), self._hooks.watched():
            self.compute(x, self.kwargs(inputs), add)

    def differentiate(
        self,
        x: Tensor,
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        cotangent: Tensor,
        add: Add | None,
        add_gradient: Add | None,
    ) -> list[Tensor | None]:
        """Recompute every piece, pass it to ``add``, and its gradient for x to ``add_gradient``.

        Returns the gradients of ``inputs``, None where ``needed`` is False.
        """
        count = self._count
        cut = [t.detach().requires_grad_(need) for t, need in zip(inputs[:count], needed[:count], strict=True)]
        parameters = self._parameters.leaves(inputs[count:], needed[count:])
        sums = GradientSums([*cut, *parameters], needed)
        with ExitStack() as seen:
            seen.enter_context(self._working(inputs))
            for held in (
                self._parameters.held(parameters),
                self._buffers.held(),
                self._modes.held(),
                self._hooks.held(),
            ):
                seen.enter_context(held)
            self.compute_again(x, self.kwargs(cut), Repetition(cotangent, sums, add, add_gradient))
            return sums.results

    def compute(self, x: Tensor, kwargs: dict[str, Any], add: Add) -> None:
        """Implement :meth:`run`, given the keyword arguments."""
        for index in each(self.slices(x)):
            add(index, self._value(x[index], kwargs))

    def compute_again(self, x: Tensor, kwargs: dict[str, Any], again: Repetition) -> None:
        """Implement :meth:`differentiate`, given leaves for keyword arguments and parameters."""
        for index in each(self.slices(x)):
            piece = x[index].detach().requires_grad_(again.add_gradient is not None)
            with torch.enable_grad():
                value = self._value(piece, kwargs)
            if again.add is not None:
                again.add(index, value.detach())
            (of_piece,) = again.sums.backward(value, again.cotangent[index].to(value.dtype), [piece])
            del value
            if again.add_gradient is not None and of_piece is not None:
                again.add_gradient(index, of_piece)

    def _value(self, piece: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if self.norm is None:
            return value_of(self.module, piece, kwargs)
        value: Tensor = self.module(self.norm(piece), **kwargs)
        return value

    def _working(self, inputs: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Tell a dry run which module is at work, by a parameter: a norm's come first, the branch's own last."""
        return working_on(inputs[-1] if len(inputs) > self._count else None)


class Repetition(NamedTuple):
    """Holds the arguments of a branch's recomputation: its output's cotangent and the receivers of its results.

    sums: gradients of keyword arguments and parameters. add: the value of each piece. add_gradient: its gradient for x.
    """

    cotangent: Tensor
    sums: GradientSums
    add: Add | None
    add_gradient: Add | None


@dataclass(frozen=True)
class _Place:
    """A placeholder for a tensor among keyword arguments."""

    number: int


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to every leaf of nested tuples, lists and dictionaries, and of dataclasses with gradients."""
    if isinstance(value, dict):
        mapped = copy.copy(value)
        mapped.update({key: _map_leaves(function, item) for key, item in value.items()})
        return mapped
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_leaves(function, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_leaves(function, item) for item in value)
    if is_dataclass(value) and not isinstance(value, nn.Module | _Place | type):
        items = {field.name: getattr(value, field.name, None) for field in fields(value)}
        trained = {k: x for k, x in items.items() if isinstance(x, _Place) or getattr(x, "requires_grad", False)}
        if trained:
            changed: Any = copy.copy(value)
            for name, item in trained.items():
                object.__setattr__(changed, name, _map_leaves(function, item))
            return changed
    return function(value)


def value_of(module: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return ``module(x)`` of a stream x that is still needed: a module that works in place gets a copy.

    Raises ValueError for a module that changes x without having an attribute ``inplace``; under a compiler it gets a
    copy, too.
    """
    if torch.compiler.is_compiling():
        # A compiler cannot tell afterwards what was changed, and leaves out a copy that nobody changes.
        copied: Tensor = module(x.clone(), **kwargs)
        return copied
    in_place = any(getattr(part, "inplace", False) for part in module.modules())
    before = version(x)
    value: Tensor = module(x.clone() if in_place else x, **kwargs)
    expected = "a branch that leaves its input unchanged, or has a module with an attribute inplace = True"
    require(version(x) == before, type(module).__name__, expected, "an input changed in place")
    return value


def branch_of(module: nn.Module, x: Tensor, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> Branch:
    """Return the module's own pieces of x if it offers any (``as_branch``), else a single piece; after the norm."""
    offer = pieces_of(module)
    if offer is None:
        return Branch(module, kwargs, norm)
    return offer(x, kwargs) if norm is None else offer(x, kwargs, norm=norm)


def pieces_of(module: nn.Module) -> Callable[..., Branch] | None:
    """Return ``module.as_branch`` if it is equivalent to ``module.forward``, which pieces do not call; else None."""
    order = type(module).__mro__
    offers, computes = (
        next((place for place, kind in enumerate(order) if name in vars(kind)), len(order))
        for name in ("as_branch", "forward")
    )
    # A subclass with a forward of its own must offer its own pieces, too.
    if offers > computes or reason_against(module) is not None:
        return None
    found: Callable[..., Branch] = module.as_branch  # type: ignore[assignment]
    return found


def refuse_sharded(module: nn.Module) -> None:
    """Raise if a part of ``module`` is sharded by itself: its gradients would bypass the hooks that reduce them."""
    for name, part in module.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        whole = not kinds & {"FSDPModule", "FullyShardedDataParallel"}
        expected = "fully_shard applied to the whole reversible block, or to the Chunked module, not to a part of it"
        require(whole, f"{type(module).__name__}.{name}".rstrip("."), expected, "a sharded part")


def apply_piecewise(branch: Branch, x: Tensor) -> Tensor:
    """The branch's output for x; only x, and results kept on request, are stored for backward. Differentiable once.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from memory_efficient_attention_pytorch.recompute import Branch, apply_piecewise
        >>> layer, x = nn.Linear(8, 8), torch.randn(2, 8)
        >>> torch.equal(apply_piecewise(Branch(layer, {}), x), layer(x))
        True
    """
    out: Tensor = _Piecewise.apply(branch, Replay(x), x, *branch.bound())
    return out


def in_pieces(module: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return ``module(x, **kwargs)`` by the pieces that the module offers."""
    return apply_piecewise(module.as_branch(x, kwargs), x)


def adding_to(total: Tensor | None) -> Add | None:
    """Return a function that adds what it is given to slices of ``total``; None without a total."""
    return None if total is None else lambda index, value: total[index].add_(value)


def slice_for(value: Tensor, whole: Tensor, index: Index) -> Tensor:
    """Return the slice of ``whole`` that a piece's value is for. Raises ValueError for another shape.

    Sums in place would broadcast a smaller one.
    """
    part = whole[index]
    expected = f"a value of the output's slice, {tuple(part.shape)}"
    require(value.shape == part.shape, "piece", expected, tuple(value.shape))
    return part


class _Piecewise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branch: Branch, replay: Replay, x: Tensor, *inputs: Tensor) -> Tensor:
        ctx.branch, ctx.replay, ctx.inputs = branch, replay, len(inputs)
        out: Tensor | None = None
        dtype: torch.dtype | None = None

        def add(index: Index, value: Tensor) -> None:
            nonlocal out, dtype
            if out is None:
                dtype, out = value.dtype, branch.allocate(x, value)
            part = slice_for(value, out, index)
            part.add_(value) if branch.overlapping else part.copy_(value)

        with replay.first():
            branch.run(x, inputs, add)
        ctx.save_for_backward(x, *inputs, *replay.release())
        assert out is not None
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        inputs, kept = rest[: ctx.inputs], rest[ctx.inputs :]
        gradient = torch.zeros_like(x) if ctx.needs_input_grad[2] else None
        with ctx.replay.again(kept):
            needed = ctx.needs_input_grad[3:]
            grads = ctx.branch.differentiate(x, inputs, needed, cotangent, None, adding_to(gradient))
        return (None, None, gradient, *grads)


class ChunkBranch(Branch):
    """Computes pieces over equal slices of one dimension, given by their number or their size."""

    def __init__(
        self,
        module: nn.Module,
        norm: nn.Module | None = None,
        *,
        chunks: int = 1,
        chunk_size: int | None = None,
        dim: int = 1,
    ) -> None:
        refuse_sharded(module)
        super().__init__(module, {}, norm)
        self.chunks, self.chunk_size, self.dim = chunks, chunk_size, dim
        self.single_piece = chunk_size is None and chunks == 1

    def slices(self, x: Tensor) -> Sequence[Index]:
        require(-x.dim() <= self.dim < x.dim(), "dim", f"a dimension of x, {tuple(x.shape)}", self.dim)
        length, size = x.shape[self.dim], self._size(x)
        before = (slice(None),) * (self.dim % x.dim())
        return [(*before, slice(start, min(start + size, length))) for start in range(0, max(length, 1), size)]

    def allocate(self, x: Tensor, value: Tensor) -> Tensor:
        dim = self.dim % x.dim()
        size = min(self._size(x), x.shape[dim])
        kept = value.dim() > dim and value.shape[dim] == size and (self.dim >= 0 or value.dim() == x.dim())
        require(kept, "module", f"a token-wise module, one that keeps dimension {self.dim}", tuple(value.shape))
        return value.new_empty(*value.shape[:dim], x.shape[dim], *value.shape[dim + 1 :])

    def _size(self, x: Tensor) -> int:
        return self.chunk_size or max(1, -(-x.shape[self.dim] // self.chunks))
