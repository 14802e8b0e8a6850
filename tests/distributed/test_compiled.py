"""Two processes with compiled modules, tokens divided or parameters sharded, find what one finds without a compiler."""

import importlib.util
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.agreement import difference
from tests.distributed import compiled_processes
from tests.distributed.compiled_processes import CASES, LENGTHS, WORLD, build, loss_of
from tests.processes import run_processes

HERE = [case for case in CASES if "transformers" not in case or importlib.util.find_spec("transformers")]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """All cases run once, in two processes; the folder of what they found."""
    directory = tmp_path_factory.mktemp("compiled")
    run_processes(compiled_processes, WORLD, directory, *HERE, strict=False)
    return directory


@pytest.mark.parametrize("case", HERE)
def test_compiled_modules_in_two_processes_are_the_same_and_compiled_for_two_lengths_of_any(case, found):
    each = [load_file(found / f"{rank}.safetensors") for rank in range(WORLD)]
    model = build(case)
    for length in LENGTHS:
        model.zero_grad()
        loss = loss_of(model, case, length)
        loss.backward()
        truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        truth["loss"] = loss.detach().reshape(1)
        assert len(truth) > 10
        for ours in each:
            off = {name: difference(ours[f"{case}/{length}.{name}"], value) for name, value in truth.items()}
            assert max(off.values()) <= 2e-5, off
    for ours in each:
        graphs = [int(ours[f"{case}/{length}.graphs"]) for length in LENGTHS]
        assert graphs[1] == graphs[2]
        if "divided" in case or case == "sharded":
            assert graphs == [0, 0, 0]  # eagerly, as a whole
        else:
            assert graphs[0] > 0
