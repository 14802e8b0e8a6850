"""On two processes a model made long has the gradients that it had on one: DDP, FSDP2, accelerate, Trainer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from tests.huggingface import two_processes
from tests.huggingface.models import tokens
from tests.huggingface.two_processes import CASES, WORLD, build, trained
from tests.processes import run_processes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """All cases run once, in two processes; the folder of what they found."""
    directory = tmp_path_factory.mktemp("two_processes")
    run_processes(two_processes, WORLD, directory, strict=False)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_what_its_own_attention_finds_on_one(case, found, tmp_path):
    model = build(case)
    if case == "trainer":
        trained(model, tmp_path, batch=8, accumulation=1)
        expected, tolerance = dict(model.named_parameters()), 2e-5
    else:
        ids = tokens(batch=WORLD)
        model(input_ids=ids, labels=ids).loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        tolerance = 1e-6
    for rank in range(WORLD):
        ours = load_file(found / f"{case}-{rank}.safetensors")
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value.detach(), rtol=tolerance, atol=tolerance / 10, msg=name)
