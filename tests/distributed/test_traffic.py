"""What processes send, in which order, and how work is divided: as the formulas of benchmarks/scale.py have it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memory_efficient_attention_pytorch.attention.products import Products
from memory_efficient_attention_pytorch.attention.request import build_request
from memory_efficient_attention_pytorch.common.divided import within
from memory_efficient_attention_pytorch.distributed import all_to_all, ring
from memory_efficient_attention_pytorch.distributed.exchange import Layout
from memory_efficient_attention_pytorch.planner.processes import divided_tokens
from tests.benchmarking.scripts import load_benchmark
from tests.distributed import counted_processes
from tests.distributed.counted_processes import AT_ONCE, BUCKET, CASES, CHUNK, HEADS, SLICE, WIDTHS, Case
from tests.processes import run_processes

SIDES = ((None, None), (None, 0), (7, 0), (5, 9), (20, 9), (30, 2), (100, 100))


@pytest.fixture(scope="module")
def scale():
    return load_benchmark("scale")


@pytest.fixture(scope="module", params=(2, 4))
def counted(request, tmp_path_factory) -> Path:
    """All cases run once, in so many processes; the folder of what they noted."""
    directory = tmp_path_factory.mktemp("counted")
    run_processes(counted_processes, request.param, request.param, directory)
    return directory


@pytest.fixture
def noted(counted) -> list[list[dict[str, Any]]]:
    """Of each process what it did in every case."""
    return noted_by_process(counted, "")


def test_all_take_part_in_a_collective_before_some_send_messages_and_never_again(counted):
    """NCCL may hang where its first messages in a group are those of a few."""
    each = noted_by_process(counted, "first-")
    kinds = [[[event[0] for event in events if event[0] != "compute"] for events in of_rank] for of_rank in each]
    messages = [["send"], ["receive"], [], []][: len(each)]
    assert kinds == [[["meet", *sent], sent] for sent in messages]


def noted_by_process(counted: Path, name: str) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(counted.glob(f"{name}[0-9].json"))]


def call(scale, case: Case, world: int):
    dtype = getattr(torch, case.dtype)
    return scale.Call(
        *(world, 2 * world * CHUNK - case.missing, HEADS, case.kv_heads, *WIDTHS, *case.sides),
        batch=case.batch,
        itemsize=dtype.itemsize,
        full=max(4, dtype.itemsize),
        device="cpu",
        k_bucket=BUCKET,
        rests=case.bias,
    )


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{i} {case.method}" for i, case in enumerate(CASES)])
def test_processes_send_what_the_formulas_say_in_that_order(scale, noted, number, monkeypatch):
    monkeypatch.setitem(ring.SLICE, "cpu", SLICE)
    monkeypatch.setitem(all_to_all.AT_ONCE, "cpu", AT_ONCE)
    scale.ring_turns.cache_clear()
    case, world = CASES[number], len(noted)
    asked = call(scale, case, world)
    for backward in (False, True):
        found = [of_rank[number]["backward" if backward else "forward"] for of_rank in noted]
        for rank, events in enumerate(found):
            if case.method == "ring":
                expected = scale.ring_events(asked, rank, backward)
            else:
                expected = scale.exchange_events(asked, backward)
            merged = with_sums(expected)
            assert [without_sum(event) for event in events] == [without_sum(event) for event in merged]
            own_keys_first = case.method == "ring"
            sums = [[event[1] for event in each if event[0] == "compute"] for each in (events, merged)]
            for place, (operations, least) in enumerate(zip(*sums, strict=True)):
                # Tiles at an edge of what is seen are computed whole: for a query less than a tile's keys at each.
                edges = sum(side is not None for side in case.sides)
                spare = asked.operations(2 * asked.local * BUCKET * edges * world, backward)
                whole = case.sides == (None, None) or (case.sides == (None, 0) and own_keys_first and place > 1)
                assert least <= operations <= least + (0 if whole else spare)
        sent = [sum(event[-1] for event in events if event[0] in ("send", "exchange")) for events in found]
        if case.method == "all_to_all":
            to_others = (world - 1) / world
            assert [total * to_others for total in sent] == [scale.exchange_bytes(asked, backward)] * world
        elif not case.missing:
            assert sum(sent) == pytest.approx(world * scale.ring_bytes(asked, backward), abs=0.5)


def with_sums(events):
    """Computations that follow one another as one."""
    found: list[list[Any]] = []
    for event in map(list, events):
        if event[0] == "compute" and found and found[-1][0] == "compute":
            found[-1][1] += event[1]
        else:
            found.append(event)
    return found


def without_sum(event):
    return event[0] if event[0] == "compute" else event


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_nothing_travels_that_nobody_sees_and_all_that_somebody_does(scale, size, sides, monkeypatch):
    """Against the mask, key by key; and the schedule on paper is the code's."""
    monkeypatch.setitem(ring.SLICE, "cpu", 2**9)  # one bucket of 8, or eight of 1
    scale.ring_turns.cache_clear()
    for tokens, bucket in itertools.product((61, 64, 200), (1, 8)):
        layout, positions = Layout(tokens, size), np.arange(tokens)
        if layout.chunk * (2 * size - 1) >= tokens:
            continue
        left, right = (tokens if side is None else side for side in sides)
        apart = positions[None] - positions[:, None]
        seen = (apart <= right) & (apart >= -left)
        asked = scale.Call(size, tokens, 4, 2, 8, 8, *sides, device="cpu", k_bucket=bucket)
        on_paper = scale.ring_turns(asked)
        for rank in range(size):
            own = np.concatenate([positions[part] for part in layout.chunks(rank)])
            wanted = set(np.flatnonzero(seen[own].any(axis=0))) - set(own)
            turns = ring.turns(layout, rank, sides, bucket, scale.longest_slice(asked) // bucket)
            got = [key for turn in turns if turn.step and turn.got for key in positions[turn.got]]
            assert sorted(got) == sorted(wanted)
            counts = [(turn.step, _tokens(turn.got), _tokens(turn.given)) for turn in turns]
            assert counts == [(t.step, t.got[rank], t.given[rank] if t.step else 0) for t in on_paper]
            assert sum(turn.scores[rank] for turn in on_paper) == seen[own].sum()


def _tokens(part: slice | None) -> int:
    return 0 if part is None else part.stop - part.start


@pytest.mark.parametrize("at_once", [2**12, 2**21], ids=["a bucket at a time", "several"])
@pytest.mark.parametrize("processes", [2, 8, 64])
def test_under_causality_all_have_as_much_to_do_after_every_turn(scale, processes, at_once, monkeypatch):
    """They wait for one another in each."""
    monkeypatch.setitem(ring.SLICE, "cpu", at_once)
    scale.ring_turns.cache_clear()
    asked = scale.Call(processes, 4096 * processes, 8, 8, 64, 64, itemsize=4, device="cpu", k_bucket=128)
    turns = scale.ring_turns(asked)
    assert len(turns) > 3 * processes
    done = np.cumsum([turn.scores for turn in turns], axis=0)
    assert done[-1].max() <= 1.1 * done[-1].mean()
    a_slice = scale.longest_slice(asked) * asked.local
    assert (done[1:].max(axis=1) - done[1:].min(axis=1)).max() <= a_slice


@pytest.mark.parametrize("sides", [(None, None), (None, 0), (None, 7), (16, 0), (100, 0), (300, 0), (90, 90)])
def test_of_few_tokens_the_way_taken_by_itself_is_the_one_that_sends_less(scale, sides):
    """In single precision, forward and backward, but for the log-sum-exps that an exchange sends besides."""
    ways = set()
    for size, kv_heads, share in itertools.product((2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8)):
        asked = scale.Call(size, 128 * size, kv_heads * share, kv_heads, 8, 8, *sides, itemsize=4, device="cpu")
        taken = way_taken(size, asked.tokens, (asked.heads, kv_heads), 8, window=sides)
        of_ring, of_exchange = (
            sum(sent(asked, backward) for backward in (False, True))
            for sent in (scale.ring_bytes, scale.exchange_bytes)
        )
        sums = 2 * asked.heads * 4 * asked.local * (size - 1) / size
        less = "all_to_all" if scale.can_exchange(asked) and of_exchange - sums < of_ring - 1 else "ring"
        assert taken == less, asked
        ways.add(taken)
    assert "ring" in ways
    assert len(ways) == 2 or sides in ((16, 0), (100, 0))


@pytest.mark.parametrize(
    ("tokens", "heads", "taken"),
    [
        (4096, (4, 4), "all_to_all"),  # 8 MiB of the one head of each process
        (16384, (4, 4), "ring"),  # 32 MiB of it, as much as the process's tokens of all four take
        (16384, (8, 8), "all_to_all"),  # a head at a time of two, half of what the tokens take
        (4096, (4, 2), "ring"),  # would send more
    ],
)
def test_heads_are_exchanged_where_that_sends_less_and_takes_little_memory(tokens, heads, taken):
    assert way_taken(4, tokens, heads, 64, causal=True) == taken


def way_taken(size: int, tokens: int, heads: tuple[int, int], width: int, **given: Any) -> str:
    """The way that one of so many processes takes by itself for query and key heads of this width, on a CPU."""
    divided = divided_tokens(tokens, size)
    with within(divided):
        q, k, v = (torch.empty(1, h, divided.local_tokens, width, device="meta") for h in (heads[0], *heads[1:] * 2))
        request = replace(build_request(q, k, v, **given), device_type="cpu")
        return divided.way(Products(), request).name
