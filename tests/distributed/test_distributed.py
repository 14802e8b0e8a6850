"""Two processes over gloo compute the gradients that one process averages by hand, with DDP and with FSDP2."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.agreement import difference
from tests.distributed import two_processes
from tests.distributed.two_processes import CASES, RATE, STEPS, WORLD, build, loss_of
from tests.processes import run_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Path:
    """All cases run once, in two processes; the folder of what they found."""
    directory = tmp_path_factory.mktemp("two_processes")
    run_processes(two_processes, WORLD, directory)
    return directory


def by_hand(case):
    """Every step's losses and averaged gradients in one process, as `train` names them."""
    model, truth = build(case), {}
    for step in range(STEPS):
        gradients: dict[str, torch.Tensor] = {}
        for rank in range(WORLD):
            loss = loss_of(model, case, rank, step)
            truth[f"{step}.loss", rank] = loss.detach()
            used = [name for name, p in model.named_parameters()]
            each = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            for name, gradient in zip(used, each, strict=True):
                if gradient is not None:
                    gradients[name] = gradients.get(name, 0) + gradient / WORLD
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter -= RATE * gradients[name]
        for rank in range(WORLD):
            truth.update({(f"{step}.{name}", rank): gradient for name, gradient in gradients.items()})
    return truth


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_averaged_by_hand(case, found):
    truth = by_hand(case)
    for rank in range(WORLD):
        ours = load_file(found / f"{case}-{rank}.safetensors")
        expected = {name for name, of in truth if of == rank}
        assert set(ours) == expected
        assert any(name.startswith("1.layers.0") or name.startswith("1.net") for name in expected)
        for name, value in ours.items():
            error = difference(value, truth[name, rank])
            assert error <= 1e-5, f"{name} on rank {rank}: off by {error:.1e}"


def test_a_sharded_branch_is_refused(found):
    """Its gradients would bypass autograd: the block is what to shard."""
    for rank in range(WORLD):
        message = (found / f"refusal-{rank}.txt").read_text()
        assert "expected fully_shard applied to the whole reversible block" in message
