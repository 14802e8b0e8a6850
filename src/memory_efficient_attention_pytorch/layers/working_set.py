"""Choose the default number of pieces of a branch: enough to keep the working set of one piece small.

The number follows from shapes, the kind of device and the CPU's threads, not from free memory, so that a repeated run
is divided in the same way. It is chosen once per call, in the forward pass. Where tokens are divided over processes
there are as many pieces as for the whole sequence, so that each process needs its share of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import dry_run
from ..common.divided import active, whole_tokens
from ..common.precision import compute_dtype
from ..torch_internals.tensors import are_plain

WHOLE = 32 << 20
"""Largest working set, in bytes, of a branch in one piece: below, pieces would save next to nothing."""
PIECE = {"cpu": 16 << 20}
"""Largest working set, in bytes, of a piece where there are several: smaller on a CPU, for its caches."""
LEAST_TOKENS = {"cpu": 256}
"""Fewest tokens per feed-forward piece: with fewer, matrix products and sums of gradients become slow."""
LEAST_TOKENS_ELSEWHERE = 1024


def feed_forward_chunks(batch: int, tokens: int, hidden: int, itemsize: int, device_type: str = "cpu") -> int:
    """Return the number of chunks of tokens. A chunk's working set is its ``hidden`` values per token, twice."""
    per_token = 2 * hidden * itemsize
    all_tokens = batch * tokens
    if all_tokens * per_token <= WHOLE:
        return 1
    least = LEAST_TOKENS.get(device_type, LEAST_TOKENS_ELSEWHERE)
    in_a_chunk = max(PIECE.get(device_type, WHOLE) // per_token, least)
    return max(1, min(tokens, -(-all_tokens // in_a_chunk)))


def head_chunks(
    batch: int,
    tokens: tuple[int, int],
    heads: tuple[int, int],
    dim_head: int,
    itemsize: int,
    device_type: str = "cpu",
    threads: int = 1,
    divided: bool = False,
    may_hold: Callable[[int, int], bool] = lambda heads, kv_heads: True,
) -> int:
    """Return the number of head groups. A group's working set is its q, k, v, output and their cotangents.

    tokens: queries and keys. heads: of queries, and of keys and values. On a CPU a group holds at least as many heads ×
    batch as there are threads, which are busy with one each. divided: tokens are, over processes, to which each group
    sends its keys and values: those that share some stay together. may_hold: whether a group may be of so many.
    """

    def held(groups: int) -> tuple[int, int]:
        return heads[0] // groups, max(1, heads[1] // groups)

    def working(groups: int) -> int:
        return batch * dim_head * itemsize * sum(4 * n * count for n, count in zip(tokens, held(groups), strict=True))

    if working(1) <= WHOLE:
        return 1
    busy = threads if device_type == "cpu" else 1
    most = heads[1] if divided else heads[0]
    fits = (n for n in splits(*heads) if n <= most)
    allowed = [n for n in fits if n == 1 or (held(n)[0] * batch >= busy and may_hold(*held(n)))]
    return next((n for n in allowed if working(n) <= PIECE.get(device_type, WHOLE)), allowed[-1])


def splits(heads: int, kv_heads: int) -> list[int]:
    """Return the possible numbers of equal head groups: whole sets that share a key/value head, or parts of one."""
    share = heads // kv_heads
    sizes = {n: heads // n for n in range(1, heads + 1) if heads % n == 0}
    return [n for n, size in sizes.items() if size % share == 0 or share % size == 0]


def chunks_for(x: Tensor, hidden: int) -> int:
    """Return :func:`feed_forward_chunks` for x ``(b, n, …, dim)``, 1 for fewer than three dimensions."""
    if not _may_be_cut(x):
        return 1
    rows = math.prod(x.shape[:-1]) // max(x.shape[1], 1)
    chunks = feed_forward_chunks(rows, whole_tokens(x.shape[1]), hidden, *_kind(x))
    return max(1, min(x.shape[1], chunks))


def head_chunks_for(x: Tensor, context: Tensor | None, heads: tuple[int, int], dim_head: int) -> int:
    """Return :func:`head_chunks` for x ``(b, n, dim)`` and the context ``(b, m, dim)`` that it attends to."""
    seen = x if context is None else context
    if not _may_be_cut(x, seen):
        return 1
    counts = (whole_tokens(x.shape[1]), whole_tokens(seen.shape[1]))
    divided = active()
    limits: dict[str, Any] = {} if divided is None else {"divided": True, "may_hold": divided.may_hold}
    return head_chunks(len(x), counts, heads, dim_head, *_kind(x), dry_run.num_threads(), **limits)


def _may_be_cut(*inputs: Tensor) -> bool:
    """Return False under a compiler, which plans memory itself and may not know shapes, and under torch.func."""
    return not torch.compiler.is_compiling() and are_plain(*inputs) and all(x.dim() > 2 for x in inputs)


def _kind(x: Tensor) -> tuple[int, str]:
    return compute_dtype(x).itemsize, dry_run.device_type(x.device)
