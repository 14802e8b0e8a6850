"""The keys that a query may see: masks, causality, windows and documents, evaluated one tile at a time.

Letters used throughout: b batch, h query heads, kv key/value heads, n queries, m keys, d width of q and k, e of v.
Query i is at position ``i + m - n`` among the keys, so that the last query is aligned with the last key.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import require
from ..common.precision import is_integer
from ..common.products import MULTIPLE
from ..torch_internals.tensors import is_fake
from .broadcasting import EVERYTHING, canonical_broadcast, narrow_broadcast
from .mask_function import MaskFunction, MaskMod, Place, mask_function

Window = int | tuple[int | None, int | None]
Mask = Tensor | MaskMod
# Kinds of tiles, by mask, documents or a function; of several answers the least counts.
EMPTY, PARTIAL, FULL = range(3)


class Tile(NamedTuple):
    """A rectangle of scores, queries ``i0:i1`` by keys ``j0:j1``. full: every query may see every key."""

    i0: int
    i1: int
    j0: int
    j1: int
    full: bool

    @property
    def queries(self) -> slice:
        return slice(self.i0, self.i1)

    @property
    def keys(self) -> slice:
        return slice(self.j0, self.j1)

    @property
    def scores(self) -> int:
        return (self.i1 - self.i0) * (self.j1 - self.j0)


class Block(NamedTuple):
    """The heads, queries and keys that the given tensors hold, if they are part of a whole."""

    heads: slice
    queries: slice
    keys: slice

    def __hash__(self) -> int:
        # Slices are hashable only from Python 3.12 on.
        return hash(tuple((part.start, part.stop) for part in self))


class Row(NamedTuple):
    """A bucket of queries, the number of its scores in tiles that may be seen, and those tiles in key order."""

    queries: slice
    scores: int
    tiles: Sequence[Tile]


class _Tiles(Sequence[Tile]):
    """A row's tiles, generated on demand, since there may be millions."""

    def __init__(self, visibility: Visibility, i0: int, i1: int, keys: range, first: int) -> None:
        self.visibility, self.i0, self.i1, self.keys, self.first = visibility, i0, i1, keys, first

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Tile:  # type: ignore[override]
        j0 = self.keys[index]
        corners = (self.i0, self.i1, max(j0, self.first), min(j0 + self.keys.step, self.keys.stop))
        # Window and causality do not tell what mask and documents hide.
        return Tile(*corners, full=self.visibility.structural and self.visibility.structurally_full(*corners))


@dataclass(frozen=True)
class Visibility:
    """Describes which of m keys each of n queries may attend to: all given conditions combined by "and".

    mask: bool ``(b|1, h|1, n|1, m|1)``, True = may attend. document_ids: integers ``(b, m)``, queries are the last n.
    left, right: how many keys before and after its own position a query may see (None: all of them).
    function: a mask of indices; batch and heads: those it is evaluated for, None where it does not depend on them.
    """

    n: int
    m: int
    left: int | None = None
    right: int | None = None
    mask: Tensor | None = None
    document_ids: Tensor | None = None
    function: MaskFunction | None = None
    batch: slice | None = None
    heads: slice | None = None

    @staticmethod
    def build(
        shape: tuple[int, int, int, int],
        device: torch.device,
        mask: Mask | None = None,
        causal: bool = False,
        window: Window | None = None,
        document_ids: Tensor | None = None,
    ) -> Visibility:
        """Validate the public arguments once, for scores of shape ``(b, h, n, m)``."""
        b, h, n, m = shape
        left, right = window_sides(window)
        if causal:
            right = 0
        function = None
        if callable(mask) and not isinstance(mask, Tensor):
            function, mask = mask_function(mask), None
        if mask is not None:
            expected = "a tensor or a function (batch, head, query, key) -> bool"
            require(isinstance(mask, Tensor), "mask", expected, type(mask).__name__)
            require(mask.dtype == torch.bool, "mask", "dtype torch.bool (True = may attend)", mask.dtype)
            require(mask.device == device, "mask", f"device {device}, that of q", mask.device)
            padding = mask.shape == (b, m)
            mask = mask[:, None, None, :] if padding else canonical_broadcast(mask, shape, "mask")
        if document_ids is not None:
            require(isinstance(document_ids, Tensor), "document_ids", "a tensor", type(document_ids).__name__)
            require(is_integer(document_ids), "document_ids", "an integer dtype", document_ids.dtype)
            fits = document_ids.shape == (b, m) and n <= m
            expected = f"shape (batch, keys) = {(b, m)} with no more queries than keys"
            require(fits, "document_ids", expected, f"{tuple(document_ids.shape)} and {n} queries")
            require(document_ids.device == device, "document_ids", f"device {device}", document_ids.device)
            if document_ids.dtype in (torch.uint16, torch.uint32, torch.uint64):
                document_ids = document_ids.long()  # PyTorch has few comparisons for unsigned dtypes
        batch = heads = None
        if function is not None and 0 not in shape:
            by_sequence, by_head = function.looks_at(device)
            batch, heads = slice(0, b) if by_sequence else None, slice(0, h) if by_head else None
        return Visibility(n, m, left, right, mask, document_ids, function, batch, heads)

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys."""
        return self.m - self.n

    @property
    def trivial(self) -> bool:
        """Whether every query sees every key, as far as is known without reading tensors."""
        return self.structural and self.structurally_trivial

    @property
    def structural(self) -> bool:
        """Whether only window and causality restrict visibility."""
        return self.mask is None and self.document_ids is None and self.function is None

    @property
    def alike_in_heads(self) -> bool:
        """Whether all heads see the same keys."""
        return (self.mask is None or self.mask.shape[1] == 1) and self.heads is None

    @property
    def structurally_trivial(self) -> bool:
        """Whether window and causality hide nothing."""
        return self.structurally_full(0, self.n, 0, self.m)

    @property
    def plain_causal(self) -> bool:
        """Whether this is square and causal without further conditions: what PyTorch's kernels call causal."""
        unrestricted_left = self.left is None or self.left >= self.m - 1
        return self.right == 0 and unrestricted_left and 1 < self.n == self.m and self.structural

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The mask and the document numbers, if given."""
        return tuple(t for t in (self.mask, self.document_ids) if t is not None)

    def narrow(self, batch: slice, heads: slice) -> Visibility:
        """Return the visibility for a part of the batch and of the heads."""
        mask = None if self.mask is None else narrow_broadcast(self.mask, batch, heads)
        ids = None if self.document_ids is None else self.document_ids[batch]
        batch_asked, heads_asked = None if self.batch is None else batch, None if self.heads is None else heads
        return replace(self, mask=mask, document_ids=ids, batch=batch_asked, heads=heads_asked)

    def keys_of(self, i0: int, i1: int) -> tuple[int, int]:
        """Return the range of keys that window and causality leave visible to these queries."""
        low = 0 if self.left is None else max(0, i0 + self.offset - self.left)
        high = self.m if self.right is None else min(self.m, i1 + self.offset + self.right)
        return low, high

    def whole_tile(self, tile: Tile, q_bucket_size: int, k_bucket_size: int) -> Tile:
        """Return the whole tile of which ``tile`` is the part within a block; ``tile`` itself without a block."""
        i0 = tile.i0 - tile.i0 % q_bucket_size
        i1 = min(i0 + q_bucket_size, self.n)
        low, high = self.keys_of(i0, i1)
        j0 = tile.j0 - (tile.j0 - low) % k_bucket_size
        return Tile(i0, i1, j0, min(j0 + k_bucket_size, high), tile.full)

    def schedule(
        self, q_bucket_size: int, k_bucket_size: int, device: torch.device, block: Block | None = None
    ) -> list[Row]:
        """Return the buckets of queries that see anything, each with its tiles that are not empty.

        Within a block, these are the whole's buckets and tiles cut to the block, and in any case to the keys from the
        first to the last that padding leaves. Positions decide first which tiles are empty or full, then the tensors
        and a mask function, each with one copy from device to host, as that range takes. Without values (in a dry run)
        every tile may be partial.
        """
        rows = []
        queries, keys = (slice(0, self.n), slice(0, self.m)) if block is None else block[1:]
        begin, end = self._unpadded(keys)
        for start in range(queries.start - queries.start % q_bucket_size, queries.stop, q_bucket_size):
            i0, i1 = max(start, queries.start), min(start + q_bucket_size, queries.stop)
            low, high = self.keys_of(start, min(start + q_bucket_size, self.n))
            # Tiles begin at the same places as without a block, so that dropout draws the same.
            first, high = max(low, begin), min(high, end)
            starts = range(first - (first - low) % k_bucket_size, high, k_bucket_size) if first < high else range(0)
            rows.append(Row(slice(i0, i1), (i1 - i0) * max(0, high - first), _Tiles(self, i0, i1, starts, first)))
        if not self.structural:
            rows = self._refined(rows, (q_bucket_size, k_bucket_size, str(block)), device)
        return [row for row in rows if row.tiles]

    def _unpadded(self, keys: slice) -> tuple[int, int]:
        """Return the range of these keys outside of which a mask of keys alone hides all, widened to few lengths."""
        if self.mask is None or self.mask.shape[2] > 1 or not _has_contents(self.mask):
            return keys.start, keys.stop
        seen = self.mask.expand(-1, -1, -1, self.m)[..., keys].flatten(0, 2).any(dim=0).nonzero()
        if not len(seen):
            return keys.start, keys.start
        first, last = (seen[[0, -1], 0] + keys.start).tolist()
        return max(keys.start, first - first % MULTIPLE), min(keys.stop, last - last % MULTIPLE + MULTIPLE)

    def tile_mask(self, tile: Tile, device: torch.device) -> Tensor | None:
        """Return a bool tensor broadcastable to ``(b, h, i, j)``, True = visible; None when nothing is hidden."""
        if tile.full:
            return None
        parts = []
        if not self.structurally_full(*tile[:4]):
            parts.append(self._structural_mask(tile, device))
        if self.mask is not None:
            parts.append(narrow_broadcast(self.mask, EVERYTHING, EVERYTHING, tile.queries, tile.keys))
        if self.document_ids is not None:
            of_queries, of_keys = self._documents(self.document_ids, tile)
            parts.append((of_queries[:, :, None] == of_keys[:, None, :])[:, None])
        if self.function is not None:
            parts.append(self.function.at(self._place(tile).indices(device)))
        return reduce(operator.and_, parts)

    def structurally_full(self, i0: int, i1: int, j0: int, j1: int) -> bool:
        """Return whether window and causality let each of these queries see each of these keys."""
        reaches_left = self.left is None or j0 >= i1 - 1 + self.offset - self.left
        reaches_right = self.right is None or j1 - 1 <= i0 + self.offset + self.right
        return reaches_left and reaches_right

    def _structural_mask(self, tile: Tile, device: torch.device) -> Tensor:
        # Compared directly, since differences would take eight bytes each.
        positions = torch.arange(tile.i0 + self.offset, tile.i1 + self.offset, device=device)[:, None]
        keys = torch.arange(tile.j0, tile.j1, device=device)
        visible = None if self.right is None else keys <= positions + self.right
        if self.left is not None:
            near = keys >= positions - self.left
            visible = near if visible is None else visible.logical_and_(near)
        assert visible is not None
        return visible[None, None]

    def _refined(self, rows: list[Row], buckets: tuple[int, int, str], device: torch.device) -> list[Row]:
        """Drop tiles that tensors or the function make empty, and mark full ones."""
        said = [
            kinds for kinds in (self._by_tensors(rows), self._by_function(rows, buckets, device)) if kinds is not None
        ]
        if not said:
            return rows
        kinds = map(min, zip(*said, strict=True))
        refined = []
        for row in rows:
            of_tiles = zip(row.tiles, kinds, strict=False)
            tiles = [t._replace(full=k == FULL and self.structurally_full(*t[:4])) for t, k in of_tiles if k != EMPTY]
            refined.append(row._replace(tiles=tiles))
        return refined

    def _by_tensors(self, rows: list[Row]) -> Sequence[int] | None:
        """Return each tile's kind by mask and documents; None in a dry run, which has no values."""
        if not self.tensors or not all(map(_has_contents, self.tensors)):
            return None
        depends_on_queries = self.document_ids is not None or (self.mask is not None and self.mask.shape[2] > 1)
        corners = slice(0 if depends_on_queries else 2, 4)
        different = {tile[corners]: tile for row in rows for tile in row.tiles}
        found = dict(zip(different, _on_host([self._content(tile) for tile in different.values()]), strict=True))
        return [found[tile[corners]] for row in rows for tile in row.tiles]

    def _by_function(
        self, rows: list[Row], buckets: tuple[int, int, str], device: torch.device
    ) -> Sequence[int] | None:
        """Return each tile's kind by the mask function, which caches it; None in a dry run."""
        if self.function is None:
            return None
        first = self.function.first_head
        heads = None if self.heads is None else (first + self.heads.start, first + self.heads.stop)
        batch = None if self.batch is None else (self.batch.start, self.batch.stop)
        key = (batch, heads, self.n, self.m, self.left, self.right, *buckets)
        if key not in self.function.kept:
            kinds = []
            for row in rows:
                for tile in row.tiles:
                    visible = self.function.at(self._place(tile).indices(device))
                    if not _has_contents(visible):
                        return None
                    kinds.append(visible.any().int() + visible.all())
            self.function.kept[key] = bytes(_on_host(kinds))
        return self.function.kept[key]

    def _place(self, tile: Tile) -> Place:
        return Place(self.batch or slice(0, 1), self.heads or slice(0, 1), tile.queries, tile.keys)

    def _documents(self, ids: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return the document numbers of the tile's queries ``(b, i)`` and keys ``(b, j)``."""
        return ids[:, tile.i0 + self.offset : tile.i1 + self.offset], ids[:, tile.keys]

    def _content(self, tile: Tile) -> Tensor:
        """Return the tile's kind by its tensors, PARTIAL in doubt, as a number on their device."""
        some = every = torch.ones((), dtype=torch.bool, device=self.tensors[0].device)
        if self.mask is not None:
            part = narrow_broadcast(self.mask, EVERYTHING, EVERYTHING, tile.queries, tile.keys)
            some, every = part.any(), part.all()
        if self.document_ids is not None:
            of_queries, of_keys = self._documents(self.document_ids, tile)
            (q_low, q_high), (k_low, k_high) = of_queries.aminmax(dim=1), of_keys.aminmax(dim=1)
            some = some & ((q_low <= k_high) & (k_low <= q_high)).any()
            every = every & ((q_low == q_high) & (k_low == k_high) & (q_low == k_low)).all()
        return some.int() + (some & every)


def _has_contents(tensor: Tensor) -> bool:
    return not is_fake(tensor) and tensor.device.type != "meta"


def _on_host(numbers: list[Tensor]) -> list[int]:
    found: list[int] = torch.stack(numbers).tolist() if numbers else []
    return found


def window_sides(window: Window | None) -> tuple[int | None, int | None]:
    """Validate ``window``; return how many keys before and after its own a query sees, None for all of them."""
    if window is None:
        return None, None
    sides = (window, window) if isinstance(window, int) else window
    expected = "None, an integer of at least 0 or a pair (left, right) of such"
    valid = isinstance(sides, tuple | list) and len(sides) == 2
    valid = valid and all(s is None or (isinstance(s, int) and not isinstance(s, bool) and s >= 0) for s in sides)
    require(valid, "window", expected, repr(window))
    return sides[0], sides[1]
