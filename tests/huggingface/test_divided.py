"""A sequence divided over processes gives a changed model the loss and gradients that it has on one."""

from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("transformers")

import torch

from tests.agreement import difference
from tests.huggingface import divided_processes
from tests.huggingface.divided_processes import cases, trained
from tests.processes import run_processes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=(2, 4))
def found(request, tmp_path_factory) -> tuple[int, Path]:
    """All cases run once, in so many processes; the folder of what they found."""
    world, directory = request.param, tmp_path_factory.mktemp("divided")
    run_processes(divided_processes, world, world, directory, strict=False)
    return world, directory


truth = cache(trained)


@pytest.mark.parametrize("changed", [True, False], ids=["changed", "its own attention and loss"])
def test_processes_that_share_a_sequence_find_what_one_finds(found, changed):
    """Grouped heads, sliding windows, learned positions, soft caps; padded and packed sequences.

    In fp64, too, a model's own loss is of logits rounded to fp32, and Gemma's norms sum gradients over tokens in fp32.
    """
    world, directory = found
    each = [load_file(directory / f"{world}-{rank}.safetensors") for rank in range(world)]
    wrong, compared = [], 0
    for kind, what, method, dtype in cases(world):
        for name, value in truth(kind, what, dtype, changed=changed).items():
            for ours in each:
                error = difference(ours[f"{kind}/{what}/{method}/{dtype}/{name}"], value)
                compared += 1
                rounded = not changed or (kind == "Gemma2" and name.endswith("norm.weight"))
                exact = 1e-6 if rounded else 1e-10
                fits = error <= (exact if dtype == torch.float64 else 1e-5)
                wrong += [] if fits else [f"{kind}/{what}/{method}/{dtype}/{name}: {error:.1e}"]
    assert compared > 100
    assert not wrong


def test_what_would_mean_something_else_is_refused(found):
    world, directory = found
    parts = [
        "a model whose loss make_memory_efficient left unchanged",
        "LlamaForCausalLM, whose attention",
        "use_cache: expected",
        "input_ids: expected tokens (b, n), or inputs_embeds",
    ]
    for rank in range(world):
        told = (directory / f"refusals-{world}-{rank}.txt").read_text().splitlines()
        assert len(told) == len(parts)
        assert all(line.startswith(part) for part, line in zip(parts, told, strict=True)), told
