"""Bytes live during every operation of a step, and the timeline of a deep model from those of two shallow ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "streams",
    "attention",
    "feed-forward",
    "loss",
    "communication",
    "kernel workspace",
    "allocator",
)
"""Categories of memory. ``streams``: residual streams, embeddings, inputs and all that fits no other category."""


class Operation(NamedTuple):
    """An operation: the phase of the step, the path of the module it ran in ("" outside any) and its name.

    Examples:
        >>> from memory_efficient_attention_pytorch.planner import Operation
        >>> Operation("backward", "layers.3.1.fn", "aten.mm").describe()
        'backward of layers.3.1.fn, aten.mm'
    """

    phase: str
    module: str
    name: str

    def describe(self) -> str:
        """Return a description such as ``"backward of layers.3.1.fn, aten.mm"``."""
        name = self.name.removesuffix(".default")
        return f"{self.phase} of {self.module}, {name}" if self.module else f"{self.phase}, {name}"


@dataclass(frozen=True)
class Timeline:
    """The operations of a step in order, the bytes live during each, and the FLOPs.

    ``live`` has the shape (operations, categories), int64; columns are in the order of ``CATEGORIES``.

    Examples:
        >>> from memory_efficient_attention_pytorch.planner import CATEGORIES, Timeline, plan
        >>> config = dict(num_tokens=256, max_seq_len=1024, dim=64, depth=2, causal=True)
        >>> timeline = plan(config, batch_size=1, seq_len=1024, device="cpu").timeline
        >>> isinstance(timeline, Timeline), timeline.live.shape == (len(timeline.operations), len(CATEGORIES))
        (True, True)
        >>> int(timeline.totals[timeline.peak]) == sum(timeline.breakdown(timeline.peak).values())
        True
    """

    operations: list[Operation]
    live: NDArray[np.int64]
    flops: float

    def __repr__(self) -> str:
        return f"Timeline({len(self.operations)} operations)"

    @property
    def totals(self) -> NDArray[np.int64]:
        """Bytes live during each operation: int64, shape (operations,)."""
        return np.asarray(self.live.sum(axis=1))

    @property
    def peak(self) -> int:
        """Index of the operation with the most bytes live."""
        return int(self.totals.argmax())

    @property
    def peak_bytes(self) -> int:
        """The most bytes live during an operation."""
        return int(self.totals.max())

    def breakdown(self, index: int) -> dict[str, int]:
        """Return the bytes of each category live during operation ``index``."""
        return dict(zip(CATEGORIES, self.live[index].tolist(), strict=True))


def as_row(live: Mapping[str, int]) -> list[int]:
    return [live.get(category, 0) for category in CATEGORIES]


def at_depth(shallow: Timeline, deeper: Timeline, repeats: int) -> Timeline:
    """Return the timeline of a model with ``repeats`` more blocks than ``shallow``; ``deeper`` has one more.

    Another block does two things: it inserts its operations, and it raises the bytes live before and after them by an
    amount of its own. So does each further block. Nothing is assumed about what a block takes, only that the first and
    the last block of ``shallow`` (two blocks, or three where a block touches its neighbours) may differ from the rest.

    Raises ValueError if the operations do not line up like this.
    """
    segments = [_stretch(*pair, repeats) for pair in zip(_segments(shallow), _segments(deeper), strict=True)]
    operations = [operation for segment, _ in segments for operation in segment]
    live = np.concatenate([rows for _, rows in segments])
    return Timeline(operations, live, shallow.flops + repeats * (deeper.flops - shallow.flops))


Segment = tuple[list[Operation], NDArray[np.int64]]


def _segments(timeline: Timeline) -> Iterator[Segment]:
    """Yield the passes of a step: forward with the loss, backward, optimizer; or the prompt and the next token."""
    passes = [_PASSES[operation.phase] for operation in timeline.operations]
    for number in sorted(set(_PASSES.values())):
        places = [i for i, found in enumerate(passes) if found == number]
        start, stop = (places[0], places[-1] + 1) if places else (0, 0)
        yield timeline.operations[start:stop], timeline.live[start:stop]


_PASSES = {"forward": 0, "loss": 0, "backward": 1, "optimizer": 2, "next token": 1}


def _stretch(shallow: Segment, deeper: Segment, repeats: int) -> Segment:
    short, long = shallow[0], deeper[0]
    added = len(long) - len(short)
    if not short and not long:
        return shallow
    # Among equal blocks any may be the added one.
    place = _middle(short, len(short) - _common(short[::-1], long[::-1]), _common(short, long))
    if added < 0 or _names(short) != _names(long[:place] + long[place + added :]):
        raise ValueError("the blocks are not alike: another one does more than add its own operations")
    before = deeper[1][:place] - shallow[1][:place]
    after = deeper[1][place + added :] - shallow[1][place:]
    block = deeper[1][place : place + added]
    # By how much one more block raises the bytes live just before the inserted operations, and just after them.
    first = before[-1] if len(before) else after[0]
    last = after[0] if len(after) else first
    rows = [shallow[1][:place] + repeats * before]
    rows += [block + (repeats - 1) * first + i * (last - first) for i in range(repeats)]
    rows.append(shallow[1][place:] + repeats * after)
    return _renumbered(long, place, added, repeats), np.concatenate(rows)


def _middle(operations: Sequence[Operation], least: int, most: int) -> int:
    """Return a place from ``least`` to ``most``: between two blocks, or in the middle of the second of three.

    Buffers that a library keeps from their first use on belong to the first block that runs, not to each added one.
    """
    places: dict[str, list[int]] = {}
    for place, operation in enumerate(operations):
        if number := _NUMBER.search(operation.module):
            places.setdefault(number[0], []).append(place)
    half, odd = divmod(len(places), 2)
    inner = list(places.values())[half] if places else [(least + most) // 2]
    return max(least, min(inner[len(inner) // 2 if odd else 0], most))


def _names(operations: Sequence[Operation]) -> list[str]:
    return [operation.name for operation in operations]


def _common(a: Sequence[Operation], b: Sequence[Operation]) -> int:
    """Count the leading operations that both have in common."""
    pairs = enumerate(zip(_names(a), _names(b), strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _renumbered(long: list[Operation], place: int, added: int, repeats: int) -> list[Operation]:
    """Return ``long`` with the inserted operations repeated and blocks numbered as in the deep model."""
    backward = long[0].phase == "backward"
    last = repeats - 1
    found = _shifted(long[:place], last if backward else 0)
    for i in range(repeats):
        found += _shifted(long[place : place + added], last - i if backward else i)
    return found + _shifted(long[place + added :], 0 if backward else last)


def _shifted(operations: list[Operation], by: int) -> list[Operation]:
    def shifted(operation: Operation) -> Operation:
        return operation._replace(module=_NUMBER.sub(lambda match: str(int(match[0]) + by), operation.module, count=1))

    of_each = {operation: shifted(operation) for operation in set(operations)}  # few are different
    return [of_each[operation] for operation in operations]


_NUMBER = re.compile(r"(?<=\blayers\.)\d+")
