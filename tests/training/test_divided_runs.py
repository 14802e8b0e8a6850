"""Runs whose processes divide the tokens of each window, the model, or both learn what one process does."""

import json
import os
import subprocess
import sys

import pytest
import torch

from memory_efficient_attention_pytorch.training.parts import load_parts, shapes_in
from memory_efficient_attention_pytorch.training.runs import start_run
from tests.agreement import apart
from tests.cli import train_command
from tests.training.divided_runs import REFUSED, RESUMED, RUNS, config, quiet, run_all


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """All cases run once, by two and by four processes."""
    directory = tmp_path_factory.mktemp("divided")
    (directory / "text.txt").write_text("".join(f"line {i} of a text to learn\n" for i in range(300)))
    for world in sorted({processes for processes, *_ in RUNS.values()}):
        train_command.together(world, run_all, directory)
    return directory


def measured(run, name):
    """What the run's records have under a name, in order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def weights(run, step=4):
    """Those of a checkpoint, whole, whoever wrote its parts."""
    files = sorted((run / f"checkpoints/step-{step:08d}").glob("model*.safetensors"))
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes_in(files).items()}
    load_parts(files, tensors)
    return tensors


@pytest.mark.parametrize("case", RUNS)
def test_the_loss_curve_is_that_of_one_process(case, directory, tmp_path):
    """In bf16 the processes add in another order, so products round otherwise."""
    ours = config(directory, case, divided=True)
    start_run(config(directory, case, divided=False), tmp_path / "one", quiet)
    tolerance = 1e-5 if ours.precision != "bf16" else 2e-3
    for name, count in {"loss": 4, "validation_loss": 3, "gradient_norm": 4}.items():
        found, truth = (measured(run, name) for run in (directory / case, tmp_path / "one"))
        assert len(found) == count
        assert found == pytest.approx(truth, rel=tolerance), name
        assert max(found) - min(found) > 5 * tolerance  # it learns: the weights take part
    assert apart(weights(directory / case), weights(tmp_path / "one")) < 5 * tolerance


def test_a_run_goes_on_to_the_bit(directory):
    for name in ("loss", "validation_loss", "gradient_norm", "sample"):
        assert measured(directory / "half", name) == measured(directory / RESUMED, name)
    assert apart(weights(directory / "half"), weights(directory / RESUMED)) == 0


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_said_once_and_ends_all_with_status_2(case, directory):
    first, second = (json.loads((directory / f"refused-2-{rank}.json").read_text())[case] for rank in range(2))
    assert (first["status"], second["status"]) == (2, 2)
    assert first["error"].startswith("mea train: ")
    assert first["error"].count("\n") == 1
    assert REFUSED[case][1] in first["error"]
    assert second["error"] == ""
    assert not (directory / "runs").exists()


def test_the_device_with_least_free_memory_decides(directory):
    """Two processes on a CPU share its 2 GiB; the main one's 8 are not what both have."""
    for rank in range(2):
        found = json.loads((directory / f"memory-2-{rank}.json").read_text())
        assert found["auto"] == 1 << 30
        assert "in the 1 GiB free" in found["None"]


@pytest.mark.parametrize("options", [{"context_parallel": 2}, {"shard": True}])
def test_one_process_has_nobody_to_share_with(options, directory, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(options))} divides .* there is one: start .* with torchrun"):
        start_run(config(directory, "context", divided=False).updated(options), tmp_path / "one", quiet)
    assert not (tmp_path / "one").exists()


def test_accelerate_launches_it(directory, tmp_path):
    """Its name for several processes is --multi_gpu, whatever they run on."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += [
        "-m",
        "memory_efficient_attention_pytorch",
        "train",
        "--context-parallel=2",
        "--device=cpu",
        "--sample-every=0",
    ]
    small = {"data": directory / "text.txt", "dim": 16, "depth": 1, "heads": 2, "seq-len": 16, "steps": 1}
    small["sample-every"] = 0
    done = subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in small.items())],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes (1 x 2: windows x tokens)" in done.stdout
    assert done.stdout.count("done: 1 steps") == 1
