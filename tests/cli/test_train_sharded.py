"""A sharded run's checkpoints: written in parts, read by any number of processes; a kill of one costs nothing."""

import json
import shutil
import signal
import time

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from memory_efficient_attention_pytorch.cli import main
from memory_efficient_attention_pytorch.training import load_run
from memory_efficient_attention_pytorch.training.run_directory import RunDirectory
from tests.cli.train_command import launch, mea

# Of the sides that are divided 3 and 12 leave a process of four without a part, and 18 one with less.
MODEL = ["--dim=12", "--depth=2", "--heads=3", "--dim-head=6", "--kv-heads=1", "--ff-mult=1", "--seq-len=16"]
LOOP = ["--evaluate-every=4", "--evaluation-windows=4", "--checkpoint-every=2", "--sample-every=0", "--warmup-steps=2"]
STEPS, WINDOWS = 8, 4


def options(text, processes, steps=STEPS):
    return ["--data", str(text), *MODEL, *LOOP, *batch(processes), f"--steps={steps}", "--device=cpu"]


def batch(processes):
    return [f"--batch-size={WINDOWS // processes}"]


def trained(folder, processes, *arguments):
    """Train to the end in so many processes."""
    for result in [each.finish() for each in launch(folder, processes, "train", *arguments)]:
        assert result.status == 0, result.error


def losses(folder, steps=STEPS):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert sorted(found) == list(range(1, steps + 1))
    return torch.tensor([found[step] for step in sorted(found)])


def last(folder):
    return RunDirectory(folder).checkpoints.find("last")


def contents(folder):
    return {file.name: file.read_bytes() for file in last(folder).path.iterdir() if file.suffix == ".safetensors"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text):
    """Runs to the end in two processes, sharded, and in one."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "here"
    folder.mkdir()
    trained(folder, 2, *options(text, 2), "--shard", "--out=two")
    assert mea(folder, "train", *options(text, 1), "--out=one").status == 0
    return folder


def test_each_process_writes_its_part_and_any_number_goes_on(here, text, uninterrupted):
    """2 → 4 → 1 → 2 processes, sharded, sharded, whole, sharded: the losses are those of one that never stopped."""
    trained(here, 2, *options(text, 2, steps=2), "--shard", "--out=run", "--final-learning-rate=1")
    parts = {f"{kind}-{i:05d}-of-00002.safetensors" for kind in ("model", "optimizer") for i in (1, 2)}
    assert set(contents(here / "run")) == parts
    sizes = [len(content) for name, content in contents(here / "run").items() if name.startswith("optimizer")]
    assert max(sizes) < 0.6 * sum(sizes)
    trained(here, 4, "--resume", "run", "--steps=4", *batch(4))
    assert len(contents(here / "run")) == 8
    assert mea(here, "train", "--resume", "run", "--steps=6", *batch(1), "--no-shard").status == 0
    assert set(contents(here / "run")) == {"model.safetensors", "optimizer.safetensors"}
    trained(here, 2, "--resume", "run", "--steps=8", *batch(2), "--shard")
    whole = mea(here, "train", *options(text, 1), "--out=whole", "--final-learning-rate=1")
    assert whole.status == 0
    assert (losses(here / "run") - losses(here / "whole")).abs().max() < 1e-5


def test_as_many_processes_go_on_to_the_bit(here, text, uninterrupted):
    running = launch(here, 2, "train", *options(text, 2), "--shard", "--out=run")
    while not (here / "run/checkpoints/step-00000004").exists():
        assert all(each.process.is_alive() for each in running)
        time.sleep(0.01)
    for each in running:
        each.process.kill()
        each.finish()
    trained(here, 2, "--resume", "run")
    assert contents(here / "run") == contents(uninterrupted / "two")
    assert torch.equal(losses(here / "run"), losses(uninterrupted / "two"))
    assert (losses(here / "run") - losses(uninterrupted / "one")).abs().max() < 1e-5


def test_what_parts_hold_is_exported_as_one_file_and_writes(here, uninterrupted, capsys):
    run = uninterrupted / "two"
    own, one = load_run(run, checkpoint="last"), load_run(uninterrupted / "one", checkpoint="last")
    for mine, theirs in zip(own.model.parameters(), one.model.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-5
    assert main(["export", str(run), str(here / "exported"), "--checkpoint=last"]) == 0
    assert len(list((here / "exported").glob("*.safetensors"))) == 1
    model = AutoModelForCausalLM.from_pretrained(here / "exported")
    tokens = torch.tensor([list(b"line 7 of a text")])
    assert torch.equal(model(tokens).logits, own.model(tokens))
    assert main(["generate", str(run), "--prompt=line", "--tokens=4", "--checkpoint=last"]) == 0
    _, _, written = capsys.readouterr().out.partition("\n")  # after what export says; it may itself have several lines
    assert written.startswith("line")


@pytest.mark.parametrize("damage", ["alter", "remove", "one sum less"])
def test_a_part_that_is_damaged_or_gone_is_named(here, uninterrupted, damage):
    shutil.copytree(uninterrupted / "two", here / "run")
    checkpoints = RunDirectory(here / "run").checkpoints
    path = checkpoints.find("last").path
    part = path / "optimizer-00002-of-00002.safetensors"
    if damage == "alter":
        part.write_bytes(part.read_bytes()[:-1] + b"?")
    elif damage == "remove":
        part.unlink()
    else:
        sums = (path / "SHA256SUMS").read_text().splitlines(keepends=True)
        (path / "SHA256SUMS").write_text("".join(line for line in sums if part.name not in line))
    said = []
    assert checkpoints.find("last", said.append).state.step == STEPS - 2
    assert len(said) == 1
    assert path.name in said[0]
    assert part.name in said[0]


def ends_soon_with_a_line(other, died):
    killed = time.monotonic()
    ended = other.finish()
    assert time.monotonic() - killed < 30
    assert ended.status == 1, ended.error
    assert ended.error.count(f"mea train: process {died} of 2 (counted from 0) died") == 1
    assert "Traceback" not in ended.error


@pytest.mark.parametrize(
    ("rank", "kill_at"),
    [
        pytest.param(1, 10, id="between the second's parts"),
        pytest.param(0, 32, id="before the renaming", marks=pytest.mark.slow),
    ],
)
def test_a_process_killed_while_all_save_ends_the_others_and_the_run_goes_on(here, text, uninterrupted, rank, kill_at):
    running = launch(here, 2, "train", *options(text, 2), "--shard", "--out=run", rank=rank, kill_at=kill_at)
    assert running[rank].finish().status == -signal.SIGKILL
    ends_soon_with_a_line(running[1 - rank], died=rank)
    assert last(here / "run").state.step == 2
    trained(here, 2, "--resume", "run")
    assert contents(here / "run") == contents(uninterrupted / "two")
    assert not list((here / "run/checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("division", "rank"),
    [
        pytest.param([], 1, id="windows", marks=pytest.mark.slow),
        pytest.param(["--context-parallel=2"], 0, id="tokens"),
    ],
)
def test_a_process_killed_in_a_step_ends_the_others_whatever_they_share(here, text, division, rank):
    running = launch(here, 2, "train", *options(text, 2, steps=10**6), *division, "--out=run")
    while not (here / "run/checkpoints/step-00000002").exists():
        assert all(each.process.is_alive() for each in running)
        time.sleep(0.01)
    running[rank].process.kill()
    ends_soon_with_a_line(running[1 - rank], died=rank)
    assert last(here / "run").state.step >= 2


def test_a_part_that_cannot_be_written_ends_all_with_a_line(here, text, uninterrupted):
    limit = len(contents(uninterrupted / "two")["model-00002-of-00002.safetensors"]) + 1000
    running = launch(here, 2, "train", *options(text, 2), "--shard", "--out=run", rank=1, file_limit=limit)
    first, second = (each.finish() for each in running)
    assert first.status == second.status == 1
    [said] = [line for line in first.error.splitlines() if line.startswith("mea train: ")]  # accelerate has warnings
    assert "cannot write to run (process 1: " in said
    assert list((here / "run/checkpoints").iterdir()) == []
