"""Count the bytes of live storages while a step runs on fake tensors, by the module that made them.

Loops over equal parts (chunks, slabs, groups of heads, tiles) need not run in full: a few iterations stand for all,
since each takes the same memory. Those left out still count: one of the iterations that run is multiplied by their
number, in its floating-point operations and in what it keeps for backward.
"""

from __future__ import annotations

import bisect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..common.dry_run import Alike
from ..torch_internals.fake import around_calls, graph, holders, knows_contents
from ..torch_internals.trees import TorchDispatchMode, tree_leaves
from .accounting import Accounting, Loop, operator_name
from .flops import count_flops
from .timeline import CATEGORIES, Operation, Timeline, as_row

aten = torch.ops.aten
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A place in the step: the phase and the path of the innermost module ("" outside any module)."""

    phase: str
    module: str = ""


class _Held(NamedTuple):
    """A live storage: its category, its bytes, and how many times it counts."""

    reference: weakref.ref[Any]
    category: str
    nbytes: int
    times: int = 1


class Ledger(TorchDispatchMode):
    """Counts live storages, each once however many tensors share it, from its allocation to its finalizer.

    Enter it inside a fake tensor mode. A storage first seen is charged to ``categorize(phase, place)``, where place is
    the module at work: in forward and in recomputation the innermost module, in backward the one that ran when
    the node being differentiated was made. Storages on devices other than ``device`` are not counted.

    It is also the :class:`common.dry_run.DryRun` that the package's own code asks. ``every_part``: run loops in full,
    which changes nothing but the time.

    Raises NotImplementedError, naming operation and module, where a shape or a number depends on the data, and where
    memory is not known: in oneDNN's LSTM and tensors without strides, sparse and nested ones.
    """

    def __init__(
        self,
        accounting: Accounting,
        device: torch.device,
        categorize: Callable[[str, Place], str],
        refusals: tuple[type[Exception], ...],
        every_part: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.threads, self._every_part = accounting.device.type, accounting.threads, every_part
        self._owners: dict[object, str] = {}
        self._operations: list[Operation] = []
        self._rows: list[list[int]] = []
        self._kept: list[int] = []  # for each row, how many entries of accounting.kept existed by then
        self._flops = 0.0
        self._weight = 1.0  # how many operations the current one stands for
        self._threads_at_work = 1
        self._accounting, self._device = accounting.anew(), device
        self._categorize = categorize
        self._live: Counter[str] = Counter()
        self._storages: dict[int, _Held] = {}
        self._refusals, self._graph, self._holders = refusals, graph(), holders()
        self._learning, self._unshared = True, set[tuple[int, ...]]()
        self._accepted = set[tuple[Any, ...]]()
        self._places = [Place("setup")]
        # Places in which nodes of the autograd graph were made, by their first sequence number.
        self._made_from: list[int] = [0]
        self._made_in: list[Place] = [self._places[0]]

    @property
    def phase(self) -> str:
        return self._places[-1].phase

    def enter(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Charge the storages of these tensors to ``category``, unless already charged."""
        for tensor in tensors:
            self._charge(tensor, category)

    def belongs(self, category: str, tensor: Tensor) -> None:
        """Move the tensor's storage to this category, whichever module allocated it."""
        self._change(tensor, category=category)

    def gradients_of(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move each gradient to the gradients once it is complete; until then it is the module's that made it."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda made: self.belongs("gradients", made.grad))

    def few_of(
        self, parts: Sequence[T], size: Callable[[T], float] | None, first: int, last: int, alike: Alike
    ) -> Iterable[T]:
        if self._every_part:
            return parts
        few = self._few_of(parts, size, first, last)
        return few if alike is None else self._once(alike, few)

    def _few_of(self, parts: Sequence[T], size: Callable[[T], float] | None, first: int, last: int) -> Iterator[T]:
        count, before = len(parts), self._weight
        indices = range(count) if count <= first + last else [*range(first), *range(count - last, count)]
        # Together they weigh as much as the whole loop: in proportion to their sizes or, where parts are equal, the
        # last of the first ones stands for all that are left out.
        done = 1.0 if size is None else sum(size(parts[index]) for index in indices)
        share = 1.0 if size is None else sum(map(size, parts)) / max(1, done)
        for index in indices:
            stands_for = 1 + count - len(indices) if size is None and index == first - 1 else share
            self._weight = before * stands_for
            try:
                yield parts[index]
            finally:
                self._weight = before

    def _once(self, alike: tuple[object, ...], parts: Iterable[T]) -> Iterator[T]:
        """Yield the parts of the first loop of its kind and record it; replay the record for every other one."""
        place, before, kept = self._place(), np.array(as_row(self._live)), self._accounting.kept
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), self._categorize(self.phase, place)
        key = *modes, *((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in alike)
        if key not in self._accounting.loops:
            start, flops, known = len(self._rows), self._flops, len(kept)
            yield from parts
            names = [operation.name for operation in self._operations[start:]]
            rows = np.array(self._rows[start:]).reshape(-1, len(before)) - before
            later = enumerate(list(kept.items())[known:], known)
            new = [(bisect.bisect(self._kept, number, start) - start, *item) for number, item in later]
            self._accounting.loops[key] = Loop(names, rows, (self._flops - flops) / self._weight, new)
            return
        loop = self._accounting.loops[key]
        counts = np.full(len(loop.names), len(kept))
        for start, kernel, nbytes in loop.kept:
            if kernel not in kept:
                kept[kernel] = nbytes
                counts[start:] += 1
        self._kept += counts.tolist()
        self._operations += (Operation(self.phase, place.module, name) for name in loop.names)
        self._rows += (loop.rows + before).tolist()
        self._flops += loop.flops * self._weight

    def working_on(self, owner: object) -> AbstractContextManager[None]:
        if owner == "loss":
            return self.during("loss" if self.phase == "forward" else self.phase)
        return self.during(self.phase, self._owners.get(owner, ""))

    @contextmanager
    def at_once(self, times: int) -> Iterator[None]:
        self._threads_at_work = times
        try:
            yield
        finally:
            self._threads_at_work = 1

    def keeps(self, tensor: Tensor) -> None:
        # Its storage counts as many times as the current operation.
        self._change(tensor, times=round(self._weight))

    def exists(self, tensor: Tensor, yes: bool) -> None:
        """Count the tensor's storage from now on, or no longer."""
        self._change(tensor, times=int(yes))

    def _change(self, tensor: Tensor, **changes: Any) -> None:
        key = id(tensor.untyped_storage())
        if key in self._storages:
            self._count(self._storages[key], -1)
            self._storages[key] = self._storages[key]._replace(**changes)
            self._count(self._storages[key], 1)

    def start(self) -> None:
        """Forget the operations so far, which are not part of the step."""
        self._operations.clear()
        self._rows.clear()
        self._kept.clear()
        self._flops = 0.0

    def timeline(self) -> Timeline:
        """Return the operations since ``start``."""
        live = np.array(self._rows, dtype=np.int64).reshape(-1, len(CATEGORIES))
        kept = np.cumsum([0, *self._accounting.kept.values()])
        live[:, CATEGORIES.index("kernel workspace")] += kept[self._kept]
        return Timeline(list(self._operations), live, self._flops)

    @contextmanager
    def during(self, phase: str, module: str = "") -> Iterator[None]:
        self._places.append(Place(phase, module))
        self._mark()
        try:
            yield
        finally:
            self._places.pop()
            self._mark()

    def follow(self, root: nn.Module) -> None:
        """Track which submodule is running, in recomputation too. ``root``: a copy that no other code uses."""
        for path, module in root.named_modules():
            around_calls(module, lambda path=path: self.during(self.phase, path))  # type: ignore[misc]
            self._owners |= dict.fromkeys(module.parameters(recurse=False), path)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if self.phase == "optimizer" and operator_name(func) == "aten::_local_scalar_dense":
            return 1.0  # a step counter: an update's memory does not depend on how many came before
        place = self._place()
        if (name := operator_name(func)) in _UNKNOWN:
            raise self._refused(func, place, f"{_UNKNOWN[name]} is not known")
        if func is aten.add.Tensor:
            func, args = self._as_the_engine_adds(func, args)
        try:
            result = self._result(func, args, kwargs)
        except self._refusals as error:
            why = "the shape of its result, or a number that the code reads, depends on the data"
            raise self._refused(func, place, why) from error
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if unlike := {str(tensor.layout) for tensor in made} - {"torch.strided"}:
            raise self._refused(func, place, f"its result is {unlike.pop()}, whose memory is not known")
        self.enter(self._categorize(self.phase, place), made)
        self._flops += count_flops(func, args, kwargs, result) * self._weight
        workspace = self._accounting.workspace(func, args, kwargs)
        self._note(place, str(func), workspace)
        return result

    def _refused(self, func: Any, place: Place, why: str) -> NotImplementedError:
        where = place.module or f"the {place.phase}"
        return NotImplementedError(f"{func} in {where} cannot be dry-run: {why}")

    def _result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the operation returns: for the commonest in-place ones the first argument, once accepted."""
        if kwargs or func not in _IN_PLACE or any(map(knows_contents, args)):
            return func(*args, **kwargs)
        key = func, *((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in args)
        if key in self._accepted:
            return args[0]
        result = func(*args)
        self._accepted.add(key)
        return result

    def _note(self, place: Place, name: str, workspace: int) -> None:
        self._operations.append(Operation(self.phase, place.module, name))
        self._rows.append(as_row({**self._live, "kernel workspace": workspace}))
        self._kept.append(len(self._accounting.kept))

    def exchanges(self, collective: str, arguments: tuple[Any, ...]) -> None:
        self._note(self._place(), f"c10d.{collective}", self._accounting.in_transit(collective, arguments))

    def learn_the_engine(self) -> None:
        """Learn the reference counts of a gradient that only the autograd engine holds."""
        x = torch.empty((), device=self._device, requires_grad=True)
        torch.autograd.grad(x * 1 + x * 1, x)
        self._learning = False

    def _as_the_engine_adds(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """Add two gradients of one tensor in place where the engine, which never does so with fake tensors, would.

        With real tensors it adds in place if it alone holds one of them.
        """
        if self._holders is None or self._graph is None or torch.is_grad_enabled():
            return func, args
        if self._graph.differentiated() is None:
            return func, args
        first, second, *_ = args
        if not isinstance(second, Tensor):
            return func, args  # a number, which the engine never adds
        held_by = [self._holders(first), self._holders(second)]
        if self._learning:
            self._unshared.update(held_by)
        for gradient, held, other in ((first, held_by[0], second), (second, held_by[1], first)):
            same = gradient.shape == other.shape and gradient.dtype == other.dtype
            if held in self._unshared and same and torch.ops.aten.is_non_overlapping_and_dense(gradient):
                return aten.add_.Tensor, (gradient, other)
        return func, args

    def _place(self) -> Place:
        """Return the running module or, in backward, the one that made the node being differentiated."""
        here = self._places[-1]
        number = None if here.module or self._graph is None else self._graph.differentiated()
        if number is None or self._graph is None:
            return here
        if number > self._graph.now():
            return here  # the accumulation of a parameter's gradient, which no module made
        return self._made_in[bisect.bisect_right(self._made_from, number) - 1]

    def _mark(self) -> None:
        if self._graph is not None:
            self._made_from.append(self._graph.now())
            self._made_in.append(self._place())

    def _charge(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # the same object for as long as the storage lives
        if key in self._storages or tensor.device != self._device:
            return
        held = _Held(
            weakref.ref(storage, partial(self._discharge, key)), category, storage.nbytes(), self._threads_at_work
        )
        self._storages[key] = held
        self._count(held, 1)

    def _discharge(self, key: int, _: Any) -> None:
        self._count(self._storages.pop(key), -1)

    def _count(self, held: _Held, sign: int) -> None:
        self._live[held.category] += sign * held.times * held.nbytes
        self._live["allocator"] += sign * held.times * self._accounting.rounding(held.nbytes)


_UNKNOWN = {
    "aten::mkldnn_rnn_layer": "what oneDNN allocates for an LSTM",
    "aten::_nested_tensor_from_mask": "what a nested tensor takes",
}
# They write into their first argument and return it.
_IN_PLACE = frozenset(
    {aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.lerp_.Scalar, aten.addcmul_.default}
    | {aten.addcdiv_.default, aten.addmm_.default, aten.copy_.default, aten.zero_.default}
)
