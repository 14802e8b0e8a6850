"""Nothing is lost: a run killed, stopped or failing in any way goes on to the weights of one that never stopped."""

import json
import random
import signal
import time

import pytest

from tests.cli.train_command import Mea, mea

OPTIONS = ["--dim=16", "--depth=2", "--heads=2", "--dim-head=8", "--seq-len=16", "--batch-size=2", "--dropout=0.1"]
WATCH = [
    "--evaluate-every=7",
    "--checkpoint-every=3",
    "--sample-every=10",
    "--sample-tokens=4",
    "--evaluation-windows=4",
]
STEPS = 40


def options(text, steps=STEPS):
    return ["--data", str(text), *OPTIONS, *WATCH, f"--steps={steps}"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("uninterrupted") / "here"
    folder.mkdir()
    trained(folder, *options(text))
    return folder / "runs" / "1"


def trained(folder, *arguments, **other):
    """Train to the end, and what was said."""
    result = mea(folder, "train", *arguments, **other)
    assert result.status == 0, result.error
    return result.out + result.error


def end_of(run_directory, steps=STEPS):
    """The bytes of the last weights and of the optimizer's averages."""
    last = run_directory / "checkpoints" / f"step-{steps:08d}"
    return (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()


def numbers_of(run_directory):
    """What was measured, without what depends on the clock and the machine."""
    kept = ("step", "tokens", "loss", "gradient_norm", "learning_rate", "validation_loss", "best", "sample")
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in kept} for line in lines]


def wait_for_step(run_directory, running, step=1):
    """Until the run has written so many steps to its metrics, or has ended."""
    metrics = run_directory / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()) and running.process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_same_seed_gives_the_same_weights(here, text, uninterrupted):
    trained(here, *options(text))
    assert end_of(here / "runs/1") == end_of(uninterrupted)
    assert numbers_of(here / "runs/1") == numbers_of(uninterrupted)


def test_killed_at_random_moments_it_ends_with_the_same_weights(here, text, uninterrupted):
    folder = here / "runs" / "1"
    running = Mea(here, "train", *options(text))
    wait_for_step(folder, running)
    moments, kills = random.Random(), 0
    for _ in range(6):
        time.sleep(moments.uniform(0, 0.2))
        running.process.kill()
        kills += running.finish().status == -signal.SIGKILL
        reached = len([record for record in numbers_of(folder) if "loss" in record])
        running = Mea(here, "train", "--resume", "runs/1")
        wait_for_step(folder, running, step=max(1, reached - 2))
    assert running.finish().status == 0
    assert kills >= 2
    assert end_of(folder) == end_of(uninterrupted)
    assert numbers_of(folder) == numbers_of(uninterrupted)


def test_killed_while_it_reads_its_text_it_begins_again(here, text, uninterrupted):
    assert mea(here, "train", *options(text), kill_at=3).status == -signal.SIGKILL
    assert not (here / "runs/1/data").exists()
    assert "beginning at step 0" in trained(here, "--resume")
    assert end_of(here / "runs/1") == end_of(uninterrupted)


STAGES = {
    "before the optimizer's file": 12,
    "before the sums": 27,
    "before the renaming": 34,
    "after the renaming": 35,
    "before an old one is removed": 49,
}


@pytest.mark.parametrize("kill_at", STAGES.values(), ids=STAGES)
def test_killed_during_a_checkpoint_it_ends_with_the_same_weights(here, text, uninterrupted, kill_at):
    assert mea(here, "train", *options(text), kill_at=kill_at).status == -signal.SIGKILL
    trained(here, "--resume")
    assert end_of(here / "runs/1") == end_of(uninterrupted)
    assert not list((here / "runs/1/checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(here, text, uninterrupted, number):
    folder = here / "runs" / "1"
    running = Mea(here, "train", *options(text))
    wait_for_step(folder, running)
    running.send(number)
    result = running.finish()
    assert result.status == 128 + number, result.error
    assert result.error.count("\n") == 1
    assert "go on with: mea train --resume runs/1" in result.error
    assert (folder / "loss.png").exists()
    done = max(record["step"] for record in numbers_of(folder))
    assert (folder / "checkpoints" / f"step-{done:08d}").is_dir()
    trained(here, "--resume", "runs/1")
    assert end_of(folder) == end_of(uninterrupted)
    assert numbers_of(folder) == numbers_of(uninterrupted)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_and_named(here, text, uninterrupted, name):
    folder = here / "runs" / "1"
    running = Mea(here, "train", *options(text))
    wait_for_step(folder, running, step=10)
    running.process.kill()
    running.finish()
    last, before = sorted((folder / "checkpoints").glob("step-*"))[-1:-3:-1]
    content = (last / name).read_bytes()
    (last / name).write_bytes(content[:-100] if name.startswith("model") else content[:-1] + b"?")
    said = trained(here, "--resume", "runs/1")
    assert f"{last.name} is damaged ({name} is truncated or altered)" in said
    assert f"going on after step {int(before.name.removeprefix('step-'))}" in said
    assert end_of(folder) == end_of(uninterrupted)


@pytest.mark.parametrize("damage", ["altered", "without sums", "without state", "of another version"])
def test_without_a_sound_checkpoint_it_stops_and_touches_nothing(here, text, damage):
    trained(here, *options(text, steps=9))
    folder = here / "runs" / "1"
    (folder / "checkpoints" / ".step-00000099.partial").mkdir()
    found = sorted((folder / "checkpoints").glob("step-*"))
    assert len(found) >= 2
    for path in found:
        if damage == "altered":
            (path / "optimizer.safetensors").write_bytes(b"other")
        elif damage == "of another version":
            (path / "state.json").write_text('{"steps": 3}')
        else:
            (path / {"without sums": "SHA256SUMS", "without state": "state.json"}[damage]).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = mea(here, "train", "--resume")
    assert result.status == 2, result.error
    assert result.error.count("\n") == 1
    assert all(f"checkpoint runs/1/checkpoints/{path.name} is damaged" in result.error for path in found)
    assert "nothing there was changed" in result.error
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert (folder / "checkpoints" / ".step-00000099.partial").is_dir()


def test_the_same_command_goes_on(here, text, uninterrupted):
    """With --resume added: relative paths, `auto`, --out and --config as they were."""
    (here / "links").symlink_to(text.parent)
    (here / "run.toml").write_text("dropout = 0.1\n")
    command = ["--data", f"links/{text.name}", *OPTIONS, *WATCH, f"--steps={STEPS}", "--config", "run.toml"]
    command += ["--precision=auto", "--device=auto", "--out", "mine"]
    running = Mea(here, "train", *command)
    wait_for_step(here / "mine", running, step=5)
    running.process.kill()
    running.finish()
    command[1] = f"../here/./links/{text.name}"
    for _ in range(2):
        trained(here, *command, "--resume")
    assert end_of(here / "mine") == end_of(uninterrupted)
    result = mea(here, "train", *command, "--resume", "mine", "--seed=1")
    assert result.status == 2
    assert "seed is 0 in mine and cannot change within a run" in result.error
    result = mea(here, "train", *command, "--resume", "--data", "run.toml")
    assert result.status == 2
    assert "data is " in result.error


def test_a_learning_rate_that_jumps_is_told(here, text):
    trained(here, *options(text, steps=6), "--warmup-steps=1")
    said = trained(here, "--resume", "--steps=12")
    # Half of the way from 3e-3 down to a tenth of it.
    assert "the learning rate goes on at 0.0017, where the unchanged run would be at 0.0003: --steps" in said
    assert "learning rate goes on" not in trained(here, "--resume")
    running = Mea(here, "train", "--resume", "--steps=100000")
    wait_for_step(here / "runs/1", running, step=20)
    running.process.kill()
    assert "learning rate goes on at 0.003" in running.finish().error


def test_metrics_that_were_taken_away_are_no_loss(here, text, uninterrupted):
    trained(here, *options(text))
    (here / "runs/1/metrics.jsonl").unlink()
    said = trained(here, "--resume")
    assert f"done: {STEPS} steps" in said
    assert "validation: " not in said
    (here / "runs/1/metrics.jsonl").unlink()
    trained(here, "--resume", f"--steps={STEPS + 1}")
    assert [record["step"] for record in numbers_of(here / "runs/1") if "loss" in record] == [STEPS + 1]


def test_a_full_disk_is_told_and_the_last_checkpoint_kept(here, text, uninterrupted):
    folder = here / "runs" / "1"
    weights = len(end_of(uninterrupted)[0])
    # The weights fit, the optimizer's averages, twice as large, do not.
    result = mea(here, "train", *options(text), file_limit=weights + weights // 2)
    assert result.status == 1, result.error
    assert result.error.count("\n") == 1
    for part in ("cannot write to runs/1", "File too large", "mea train --resume runs/1"):
        assert part in result.error
    assert list((folder / "checkpoints").iterdir()) == []
    trained(here, "--resume", "runs/1")
    assert end_of(folder) == end_of(uninterrupted)


def test_a_disk_too_full_for_the_text_is_told_with_a_command_to_copy(here, text):
    result = mea(here, "train", *options(text), "--out", "my run", file_limit=5000)
    assert result.status == 1, result.error
    assert result.error.count("\n") == 1
    assert "cannot write to my run" in result.error
    assert result.error.endswith("mea train --resume 'my run'\n")


def test_a_loss_that_is_no_number_stops_the_run(here, text):
    folder = here / "runs" / "1"
    wild = ["--learning-rate=1e18", "--clip=0", "--warmup-steps=0", "--evaluate-every=1"]
    result = mea(here, "train", *options(text), *wild)
    assert result.status == 1, result.error
    assert result.error.count("\n") == 1
    for part in ("became", "smaller learning rate: mea train --resume runs/1 --learning-rate 0.003"):
        assert part in result.error
    assert all(record["loss"] == record["loss"] for record in numbers_of(folder) if "loss" in record)
    trained(here, "--resume", "runs/1", "--learning-rate", "0.003", "--steps=3")


def test_a_run_is_trained_by_one_process_at_a_time(here, text):
    running = Mea(here, "train", *options(text, steps=100_000))
    wait_for_step(here / "runs" / "1", running)
    result = mea(here, "train", "--resume", "runs/1")
    running.process.kill()
    running.finish()
    assert result.status == 2
    assert "another process is training in runs/1" in result.error
