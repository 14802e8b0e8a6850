"""What a dry run answers this package's own code: which parts of a loop to go through, and as which device to decide.

Loops over equal parts (chunks, slabs, groups of heads, tiles) need not be gone through: a few iterations stand for all,
since every one takes the same memory. Those left out still count as floating-point operations: the one that runs in
their place weighs as much, and so does what it keeps for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from torch import Tensor, nn

from ..common.dry_run import Alike
from .ledger import Ledger

T = TypeVar("T")


class Watcher:
    """The :class:`common.dry_run.DryRun` of a plan; tells the ledger what it learns.

    every_part: cut no loop short, which changes nothing but the time.
    """

    def __init__(
        self, ledger: Ledger, model: nn.Module, device_type: str, threads: int, every_part: bool = False
    ) -> None:
        self.device_type, self.threads = device_type, threads
        self._ledger, self._every_part = ledger, every_part
        self._owners: dict[object, str] = {
            parameter: path for path, module in model.named_modules() for parameter in module.parameters(recurse=False)
        }

    def few_of(
        self, parts: Sequence[T], size: Callable[[T], float] | None, first: int, last: int, alike: Alike
    ) -> Iterable[T]:
        if self._every_part:
            return parts
        few = self._few_of(parts, size, first, last)
        return few if alike is None else self._ledger.once(alike, few)

    def _few_of(self, parts: Sequence[T], size: Callable[[T], float] | None, first: int, last: int) -> Iterator[T]:
        kept = representatives(len(parts), first, last)
        if size is not None:
            # They weigh as much as all the work, each as much as any other by its size.
            done = sum(size(parts[index]) for index, _ in kept)
            share = sum(map(size, parts)) / max(1, done)
            kept = [(index, share) for index, _ in kept]
        for index, stands_for in kept:
            with self._ledger.weighing(stands_for):
                yield parts[index]

    def working_on(self, owner: object) -> AbstractContextManager[None]:
        phase = self._ledger.phase
        if owner == "loss":
            return self._ledger.during("loss" if phase == "forward" else phase)
        return self._ledger.during(phase, self._owners.get(owner, ""))

    def keeps(self, tensor: Tensor) -> None:
        self._ledger.keep_as_many(tensor)


def representatives(count: int, first: int, last: int) -> list[tuple[int, float]]:
    """Indices of a few of ``count`` iterations, the first and the last ones, and how many each stands for.

    The last of those at the start stands for all that are left out.
    """
    if count <= first + last:
        return [(i, 1) for i in range(count)]
    start = [(i, 1) for i in range(first - 1)]
    return [*start, (first - 1, count - first - last + 1), *((i, 1) for i in range(count - last, count))]
