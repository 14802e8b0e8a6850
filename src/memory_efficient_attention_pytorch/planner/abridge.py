"""What a dry run knows of this package's own modules: whose work is at hand, and which loops it may cut short.

Loops over equal parts (chunks, slabs, groups of heads, tiles) need not be gone through: a few iterations stand for all,
since every one takes the same memory. The first two are kept (accumulators come into being in the first and may widen
in the second) and the last, which may be ragged. Those left out still count as floating-point operations: the one that
runs in their place weighs as much, and so does what it keeps for backward.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from ..attention import tiles as tiled
from ..attention.visibility import Tile, Visibility
from ..common import products
from ..common.recording import Found, Recording
from ..layers.attention import Attention
from ..loss import linear_cross_entropy
from ..recompute import linear_pieces, pieces
from .ledger import Ledger, Weight

T = TypeVar("T")


class Parts(Sequence[T]):
    """A sequence of equal parts that iterates over a few of them, each with the weight of those it stands for."""

    def __init__(self, parts: Iterable[T], weight: Weight, at_start: int = 2, at_end: int = 1) -> None:
        self.parts, self.weight = list(parts), weight
        self.kept = representatives(len(self.parts), at_start, at_end)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        return self.parts[index]

    def __iter__(self) -> Iterator[T]:
        for index, stands_for in self.kept:
            with self.weight.times(stands_for):
                yield self.parts[index]


def representatives(count: int, at_start: int = 2, at_end: int = 1) -> list[tuple[int, int]]:
    """Indices of a few of ``count`` iterations, the first and the last ones, and how many each stands for.

    The last of those at the start stands for all that are left out.
    """
    if count <= at_start + at_end:
        return [(i, 1) for i in range(count)]
    first = [(i, 1) for i in range(at_start - 1)]
    return [*first, (at_start - 1, count - at_start - at_end + 1), *((i, 1) for i in range(count - at_end, count))]


@contextmanager
def abridged(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Within, this package's loops over equal parts are cut short."""
    weight = ledger.weight

    def parts_of(function: Callable[..., Iterable[Any]], at_start: int = 2) -> Callable[..., Iterable[Any]]:
        return lambda *args, **kwargs: Parts(function(*args, **kwargs), weight, at_start)

    with ExitStack() as entered:
        for owner, name in _globals_that_are(linear_pieces.slabs, tiled._parts):
            entered.enter_context(replaced(owner, name, parts_of(getattr(owner, name))))
        # Nothing comes into being in a product's first part that would be there in the others.
        entered.enter_context(replaced(products, "_parts", parts_of(products._parts, at_start=1)))
        entered.enter_context(replaced(pieces.ChunkBranch, "slices", parts_of(pieces.ChunkBranch.slices)))
        entered.enter_context(replaced(linear_cross_entropy, "_chunks", parts_of(_chunks)))
        entered.enter_context(replaced(Visibility, "schedule", _schedule(weight)))
        for module in model.modules():
            if isinstance(module, Attention):
                # What is kept of each group adds up: the last finds that of all others, as in the whole loop.
                groups = Parts(module.head_groups, weight, at_end=1 if module.keep_attention else 0)
                entered.enter_context(replaced(module, "head_groups", groups))
        entered.enter_context(replaced(Recording, "find", _found_of_each(ledger)))
        yield


@contextmanager
def attributed(model: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Within, work of this package that runs outside of any module's forward is told to the ledger."""
    owners = {
        parameter: path for path, module in model.named_modules() for parameter in module.parameters(recurse=False)
    }

    def by_branch(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(branch: pieces.Branch, *args: Any, **kwargs: Any) -> Any:
            # A norm's parameters come first, those of what the branch is about last.
            owner = owners.get(branch.parameters[-1], "") if branch.parameters else ""
            with ledger.during(ledger.phase, owner):
                return function(branch, *args, **kwargs)

        return run

    def by_loss(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with ledger.during("loss" if ledger.phase == "forward" else ledger.phase):
                return function(*args, **kwargs)

        return run

    with ExitStack() as entered:
        for branch in (pieces.Branch, *_subclasses(pieces.Branch)):
            for name in {"run", "differentiate"} & vars(branch).keys():
                entered.enter_context(replaced(branch, name, by_branch(vars(branch)[name])))
        for name in ("__init__", "losses", "add_gradients"):
            loss = linear_cross_entropy.ChunkLoss
            entered.enter_context(replaced(loss, name, by_loss(getattr(loss, name))))
        yield


def _found_of_each(ledger: Ledger) -> Callable[..., Found]:
    """In place of ``Recording.find``: what it keeps counts as often as the call it came from stands for."""
    find = Recording.find

    def counted(recording: Recording, *args: Any, **kwargs: Any) -> Found:
        before = len(recording._tensors)
        found = find(recording, *args, **kwargs)
        for tensor in recording._tensors[before:]:
            ledger.stands_for(round(ledger.weight.value), tensor)
        return found

    return counted


def _globals_that_are(*functions: Callable[..., Any]) -> list[tuple[Any, str]]:
    """Where this package's modules hold these functions: each module and the name it knows the function by."""
    package = __name__.partition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == package]
    return [(module, name) for module in modules for name, value in vars(module).items() if value in functions]


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    direct: list[type[Any]] = cls.__subclasses__()
    return [found for child in direct for found in (child, *_subclasses(child))]


def _chunks(rows: Tensor, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _schedule(weight: Weight) -> Callable[[Visibility, int, int], list[_Row]]:
    """In place of ``Visibility.schedule``: a few tiles of a few rows, which together weigh as much as all scores."""

    def schedule(visibility: Visibility, q_bucket_size: int, k_bucket_size: int) -> list[_Row]:
        bounds = []
        for i0 in range(0, visibility.n, q_bucket_size):
            i1 = min(i0 + q_bucket_size, visibility.n)
            bounds.append((i0, i1, *visibility.key_range(i0, i1)))
        # Under causality rows grow, and end in wide and narrow tiles by turns; the very last may have few queries.
        places = representatives(len(bounds), at_end=3)
        kept = [_row(visibility, *bounds[index], k_bucket_size) for index, _ in places]
        scores = sum((i1 - i0) * (high - low) for i0, i1, low, high in bounds)
        share = scores / max(1, sum((tile.i1 - tile.i0) * (tile.j1 - tile.j0) for row in kept for tile in row))
        return [_Row(row, weight, share) for row in kept]

    return schedule


def _row(visibility: Visibility, i0: int, i1: int, low: int, high: int, k_bucket_size: int) -> list[Tile]:
    structural = dataclasses.replace(visibility, mask=None, document_ids=None)
    starts = range(low, high, k_bucket_size)
    tiles = []
    for index, _ in representatives(len(starts), at_end=2):
        corners = (i0, i1, starts[index], min(starts[index] + k_bucket_size, high))
        tiles.append(Tile(*corners, full=not visibility.tensors and structural._structurally_full(*corners)))
    return tiles


class _Row(list[Tile]):
    def __init__(self, tiles: Iterable[Tile], weight: Weight, share: float) -> None:
        super().__init__(tiles)
        self.weight, self.share = weight, share

    def __iter__(self) -> Iterator[Tile]:
        for tile in super().__iter__():
            with self.weight.times(self.share):
                yield tile


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` within."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
