"""Tokens divided over two and four processes: output, loss and all gradients are those of one."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memory_efficient_attention_pytorch.distributed.exchange import Layout
from tests.agreement import difference
from tests.distributed import divided_processes
from tests.distributed.divided_processes import cases, compute, peak
from tests.processes import run_processes


@pytest.fixture(scope="module", params=(2, 4))
def found(request, tmp_path_factory) -> tuple[int, Path]:
    """All cases run once, in so many processes; the folder of what they found."""
    world, directory = request.param, tmp_path_factory.mktemp("divided")
    run_processes(divided_processes, world, world, directory)
    return world, directory


@cache
def in_one_process(kind, name, grouped, dtype):
    """The same for each number of processes and each way of theirs."""
    return compute(kind, name, None, "gqa" if grouped else "", dtype)


def test_processes_that_share_a_sequence_are_one(found):
    """Masks of each kind, biases, dropout, grouped heads; reversal, pieces, kept attention, processes without labels;
    one sequence and two; 61 tokens divide by nothing."""
    world, directory = found
    each = [load_file(directory / f"{world}-{rank}.safetensors") for rank in range(world)]
    wrong, compared = [], 0
    for kind, name, method, dtype in cases(world):
        tolerance = 1e-10 if dtype == torch.float64 and "exact" not in name else 1e-5
        for key, value in in_one_process(kind, name, method.endswith("gqa"), dtype).items():
            for ours in each:
                error = difference(ours[f"{kind}/{name}/{method}/{dtype}/{key}"], value)
                compared += 1
                wrong += [f"{kind}/{name}/{method}/{key}: {error:.1e}"] if not error <= tolerance else []
    assert compared > 100
    assert not wrong


def test_divided_streams_are_rebuilt_bit_for_bit(found):
    """What reversal rebuilds, by rings and exchanges repeated, gives the gradients of storing everything."""
    world, directory = found
    compared = 0
    for rank in range(world):
        ours = load_file(directory / f"{world}-{rank}.safetensors")
        for name, value in ours.items():
            if name.startswith("network/rotary exact/"):
                assert torch.equal(value, ours[name.replace("exact/", "exact stored/")])
                compared += 1
    assert compared > 20


def test_what_would_mean_something_else_is_refused(found):
    world, directory = found
    parts = [
        "cache: expected none where",
        "cache: expected none where",
        "x: expected",
        "k: expected",
        "backend: 'naive'",
        "tensor 1: expected shape (2, 100) + (…)",
        "x: expected shape (b, n, …)",
    ]
    for rank in range(world):
        told = (directory / f"refusals-{world}-{rank}.txt").read_text().splitlines()
        assert len(told) == len(parts)
        assert all(line.startswith(part) for part, line in zip(parts, told, strict=True)), told


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_a_process_holds_its_share_and_computes_its_share(found, method):
    world, directory = found
    each = [json.loads((directory / f"counted-{world}-{rank}.json").read_text())[method] for rank in range(world)]
    assert 0 < max(of["peak"] for of in each) <= 1.1 / world * peak(None)
    operations = [of["operations"] for of in each]
    assert 0 < max(operations) <= 1.1 * min(operations)


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_token_has_one_place(tokens, size):
    layout = Layout(tokens, size)
    places = layout.places(torch.device("cpu"))
    assert len(places.unique()) == tokens
    for rank in range(size):
        for chunk in layout.chunks(rank):
            here = layout.here(rank, chunk)
            expected = torch.arange(here.start, here.stop) + rank * layout.local
            assert torch.equal(places[chunk], expected)


def test_causal_work_is_balanced():
    """Scores of each process under causality, counted."""
    layout = Layout(4096, 4)
    work = [sum(sum(range(c.start + 1, c.stop + 1)) for c in layout.chunks(rank)) for rank in range(4)]
    assert max(work) <= 1.1 * min(work)
