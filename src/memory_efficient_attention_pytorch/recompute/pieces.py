"""A residual branch as a sum of pieces, each recomputed and differentiated on its own.

A branch reads a slice of its input and adds to a slice of its output, piece by piece. So it can be added into a stream
in place, subtracted from it in place, and, the cotangent being known, recomputed and differentiated in one pass: a
piece's intermediate values live only while that piece is at work, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from ..common.dry_run import each, working_on
from ..common.errors import require
from ..common.gradients import once_differentiable
from ..common.recording import Recording

Index = tuple[Any, ...]
Add = Callable[[Index, Tensor], None]


class Replay:
    """Random state and autocast settings of a forward pass, to be put back when it is computed again.

    And the attentions that are not to be computed again. To be made where gradients are on if there will be a backward.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.cpu_state = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)
        self.device_type = tensors[0].device.type
        kinds = {"cpu", self.device_type} - {"meta"}
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)
        }
        self.recording = Recording() if torch.is_grad_enabled() else None

    @contextmanager
    def settings(self) -> Iterator[None]:
        """The recorded autocast settings, without its weight cache.

        A weight cast under ``no_grad`` and then found in the cache by the recomputation would get no gradient.
        """
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def first(self) -> Iterator[None]:
        """The forward pass."""
        with self.settings(), nullcontext() if self.recording is None else self.recording.record():
            yield

    def release(self) -> tuple[Tensor, ...]:
        """The tensors that :meth:`again` asks for."""
        return () if self.recording is None else self.recording.release()

    @contextmanager
    def again(self, kept: Sequence[Tensor]) -> Iterator[None]:
        """The pass repeated; the caller's random state is put back afterwards."""
        kind = self.device_type if self.devices else "cuda"
        recorded = nullcontext() if self.recording is None else self.recording.replay(kept)
        with torch.random.fork_rng(self.devices, device_type=kind), self.settings(), recorded:
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.states, device_type=kind)
            yield


class Branch:
    """A function of one tensor, bound to its keyword arguments, as pieces over slices of that tensor.

    ``inputs`` are the tensors besides x that may be differentiated: those among the keyword arguments (nested ones
    too), then the parameters. They are handed to an autograd Function, which keeps them; the branch itself keeps no
    tensor but parameters. ``overlapping``: several pieces add to the same slice of the output. ``single_piece``:
    all of it at once.
    """

    overlapping = False
    single_piece = True

    def __init__(
        self, function: Callable[..., Tensor], modules: Sequence[nn.Module], kwargs: Mapping[str, Any]
    ) -> None:
        self.function = function
        flat, self._spec = tree_flatten(dict(kwargs))
        self._flat = [None if isinstance(leaf, Tensor) else leaf for leaf in flat]
        self._places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
        self._tensors = [flat[i] for i in self._places]
        self._holders = [*modules, *(leaf for leaf in flat if isinstance(leaf, nn.Module))]

    @cached_property
    def parameters(self) -> list[Tensor]:
        return list(dict.fromkeys(p for module in self._holders for p in module.parameters()))

    @property
    def owner(self) -> object:
        """Who does its work, for a dry run: what the branch is about has the last parameters, a norm the first."""
        return self.parameters[-1] if self.parameters else None

    def bound(self) -> tuple[Tensor, ...]:
        """``inputs``, of which the branch then lets go."""
        tensors, self._tensors = self._tensors, []
        return *tensors, *self.parameters

    def kwargs(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """The keyword arguments, with tensors from ``inputs``."""
        flat = list(self._flat)
        for place, tensor in zip(self._places, inputs, strict=False):
            flat[place] = tensor
        return tree_unflatten(flat, self._spec)

    def leaves(self, inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        """``inputs`` for the recomputation: keyword tensors cut from their history, parameters as they are."""
        count = len(self._places)
        cut = [t.detach().requires_grad_(need) for t, need in zip(inputs[:count], needed[:count], strict=True)]
        return [*cut, *self.parameters]

    def slices(self, x: Tensor) -> Iterable[Index]:
        """The slices of x, and of the output, that the pieces read and add to."""
        return [(...,)]

    def allocate(self, x: Tensor, value: Tensor) -> Tensor:
        """An output, uninitialised, for pieces of which ``value`` is the first."""
        return torch.empty_like(value)

    def run(self, x: Tensor, inputs: Sequence[Tensor], add: Add) -> None:
        """Compute every piece once and hand it to ``add(index, value)``."""
        kwargs = self.kwargs(inputs)
        for index in self.slices(x):
            add(index, self.function(x[index], **kwargs))

    def differentiate(
        self,
        x: Tensor,
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        cotangent: Tensor,
        add: Add | None,
        add_gradient: Add | None,
    ) -> list[Tensor | None]:
        """Compute every piece once more, hand it to ``add``, and its gradient for x to ``add_gradient``.

        Returns the gradients of ``inputs``, None where ``needed`` is False.
        """
        leaves = self.leaves(inputs, needed)
        kwargs = self.kwargs(leaves)
        totals = Totals(leaves, needed)
        for index in self.slices(x):
            piece = x[index].detach().requires_grad_(add_gradient is not None)
            with torch.enable_grad():
                value = self.function(piece, **kwargs)
            if add is not None:
                add(index, value.detach())
            wanted = [*totals.leaves, *([piece] if piece.requires_grad else [])]
            if not value.requires_grad or not wanted:
                continue
            grads = vector_jacobian_product(value, wanted, cotangent[index].to(value.dtype))
            del value
            totals.add(grads[: len(totals.leaves)], cotangent)
            if add_gradient is not None and grads[-1] is not None:
                add_gradient(index, grads[-1])
        return totals.gradients


class Totals:
    """Gradients of leaves summed over pieces, in fp32 at least when there are several."""

    def __init__(self, leaves: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self._places = [i for i, need in enumerate(needed) if need]
        self.leaves = [leaves[i] for i in self._places]
        self._sums: list[Tensor | None] = [None] * len(leaves)
        self._all = leaves
        self._pieces = [0] * len(leaves)

    def add(self, grads: Sequence[Tensor | None], cotangent: Tensor) -> None:
        """Add one gradient (or None) per leaf. One that shares ``cotangent``'s memory is copied, not kept."""
        for place, grad in zip(self._places, grads, strict=True):
            if grad is None:
                continue
            total, self._pieces[place] = self._sums[place], self._pieces[place] + 1
            if total is None:
                self._sums[place] = grad.clone() if same_storage(grad, cotangent) else grad
            elif self._pieces[place] == 2:
                self._sums[place] = total.to(torch.promote_types(total.dtype, torch.float32)) + grad
            else:
                total += grad

    @property
    def gradients(self) -> list[Tensor | None]:
        """One gradient per leaf, in its dtype; None where none came."""
        pairs = zip(self._all, self._sums, strict=True)
        return [None if total is None else total.to(leaf.dtype) for leaf, total in pairs]


def same_storage(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def vector_jacobian_product(value: Tensor, wanted: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``wanted``, as an ordinary backward would find them.

    An ordinary backward runs outside of autocast, so that what the forward kept in fp32 is differentiated in fp32. And
    it runs the hooks of a parameter once, on the whole gradient: that is left to the pass that receives it.
    """
    with autocast_off(value.device.type), hooks_off(wanted):
        return torch.autograd.grad(value, wanted, cotangent, allow_unused=True)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


@contextmanager
def hooks_off(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Tensor hooks (``Tensor.register_hook``) of leaves do not run inside."""
    held = [(hooks, list(hooks.items())) for t in tensors if (hooks := t._backward_hooks)]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, items in held:
            hooks.update(items)


def branch_of(module: nn.Module, kwargs: Mapping[str, Any]) -> Branch:
    """The module's own pieces where it offers any (``as_branch``), else all of it as a single piece."""
    offer = pieces_of(module)
    return Branch(module, [module], kwargs) if offer is None else offer(kwargs)


def pieces_of(module: nn.Module) -> Callable[..., Branch] | None:
    """``module.as_branch``. None where the module has none or has hooks: pieces do not call the module as a whole."""
    return None if has_hooks(module) else getattr(module, "as_branch", None)


def has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(kinds)


def refuse_sharded(module: nn.Module) -> None:
    """Raise where a part of ``module`` gathers its parameters by itself: the gradients would go past autograd."""
    for name, part in module.named_modules():
        kinds = {kind.__name__ for kind in type(part).__mro__}
        require(
            not kinds & {"FSDPModule", "FullyShardedDataParallel"},
            f"{type(module).__name__}.{name}".rstrip("."),
            "fully_shard applied to the whole reversible block, or to the Chunked module, not to a part of it",
            "a sharded part",
        )


def apply_piecewise(branch: Branch, x: Tensor) -> Tensor:
    """The branch's output for x, keeping x (and attentions that ask for it) for backward; differentiable once."""
    return _Piecewise.apply(branch, Replay(x), x, *branch.bound())


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
            out[index].add_(value) if branch.overlapping else out[index].copy_(value)

        with replay.first(), working_on(branch.owner):
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

        def add_gradient(index: Index, value: Tensor) -> None:
            assert gradient is not None
            gradient[index].add_(value)

        with ctx.replay.again(kept), working_on(ctx.branch.owner):
            needed = ctx.needs_input_grad[3:]
            add_to = None if gradient is None else add_gradient
            grads = ctx.branch.differentiate(x, inputs, needed, cotangent, None, add_to)
        return (None, None, gradient, *grads)


class ChunkBranch(Branch):
    """Pieces over equal slices of one dimension."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        modules: Sequence[nn.Module],
        *,
        chunks: int | None = None,
        chunk_size: int | None = None,
        dim: int = 1,
    ) -> None:
        super().__init__(function, modules, {})
        self.chunks, self.chunk_size, self.dim = chunks, chunk_size, dim
        self.single_piece = chunks == 1

    def slices(self, x: Tensor) -> Iterable[Index]:
        require(-x.dim() <= self.dim < x.dim(), "dim", f"a dimension of x, {tuple(x.shape)}", self.dim)
        length = x.shape[self.dim]
        size = self.chunk_size or max(1, -(-length // (self.chunks or 1)))
        before = (slice(None),) * (self.dim % x.dim())
        starts = range(0, max(length, 1), size)
        return each([(*before, slice(start, min(start + size, length))) for start in starts])

    def allocate(self, x: Tensor, value: Tensor) -> Tensor:
        dim = self.dim % x.dim()
        size = min(self.chunk_size or -(-x.shape[dim] // (self.chunks or 1)), x.shape[dim])
        same_rank = value.dim() == x.dim() and value.shape[dim] == size
        require(same_rank, "module", f"a token-wise module, one that keeps dimension {dim}", tuple(value.shape))
        return value.new_empty(*value.shape[:dim], x.shape[dim], *value.shape[dim + 1 :])
