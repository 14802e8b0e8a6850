"""Runs in fresh processes: what they report, and how a run that cannot be had ends."""

import json
import math
import subprocess
import sys

import pytest

from memory_efficient_attention_pytorch.benchmarking import runner
from memory_efficient_attention_pytorch.benchmarking.results import Results, Run
from memory_efficient_attention_pytorch.benchmarking.runner import compare, run_job
from memory_efficient_attention_pytorch.benchmarking.schedule import Job, Settings
from memory_efficient_attention_pytorch.benchmarking.shape import Shape
from memory_efficient_attention_pytorch.benchmarking.summary import units
from memory_efficient_attention_pytorch.benchmarking.systems import find_systems
from memory_efficient_attention_pytorch.cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory on the CPU is read from /proc")
SYSTEMS = find_systems(["sdpa-stored", "sdpa-checkpoint"])
SHAPE = Shape(seq_len=512, dim=64, depth=6, heads=4)


def a_job(system, shape=SHAPE, experiment="compare"):
    return Job(experiment, 0, find_systems([system])[0], shape, repeats=1)


@pytest.mark.slow
def test_checkpointing_is_seen_to_take_less_memory_than_storing(tmp_path):
    settings = Settings(base=SHAPE, rounds=1, repeats=2, lengths=(), depths=(), vocabularies=(), threads=1)
    seen = []
    results = compare(settings, SYSTEMS, tmp_path / "r.json", seen.append)
    stored, checkpointed = results.runs
    assert (stored.outcome, checkpointed.outcome) == ("measured", "measured")
    assert units(checkpointed) < units(stored) / 2
    assert len(stored.seconds) == 2
    assert stored.loss == pytest.approx(math.log(SHAPE.num_tokens), abs=0.5)
    assert checkpointed.loss == pytest.approx(stored.loss, abs=1e-5)
    assert stored.parameters == checkpointed.parameters
    assert [progress.done for progress in seen] == [1, 2]
    assert seen[-1].seconds_left == 0
    assert Results.load(tmp_path / "r.json") == results


def test_what_does_not_fit_is_reported_and_longer_sequences_are_not_tried(monkeypatch):
    monkeypatch.setattr(runner, "_memory_limit", lambda device: 16 * 1024**2)
    settings = Settings(threads=1)
    run = run_job(a_job("sdpa-stored", Shape(seq_len=4096, dim=128, depth=2, heads=2)), settings)
    assert run.outcome == "out_of_memory"
    assert run.peak_bytes is None
    monkeypatch.setattr(runner, "measure_peak", lambda *a, **k: pytest.fail("a longer sequence was tried"))
    longer = a_job("sdpa-stored", Shape(seq_len=8192, dim=128, depth=2, heads=2))
    assert run_job(longer, settings, earlier=[run]).outcome == "out_of_memory"


@pytest.mark.parametrize(
    ("error", "outcome", "note"),
    [
        (RuntimeError("it\nbroke"), "failed", "broke"),
        (subprocess.TimeoutExpired("python", 600), "too_slow", "stopped after 600 s"),
        (MemoryError("x\ncan't allocate memory"), "out_of_memory", "can't allocate memory"),
    ],
    ids=["failed", "stopped", "memory"],
)
def test_a_run_that_ends_badly_is_a_result(monkeypatch, error, outcome, note):
    def measure(*arguments, **options):
        raise error

    monkeypatch.setattr(runner, "measure_peak", measure)
    run = run_job(a_job("sdpa-stored"), Settings())
    assert (run.outcome, run.note) == (outcome, note)


def test_nothing_is_started_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(runner, "measure_peak", lambda *a, **k: pytest.fail("a process was started"))
    slow = run_job(a_job("sdpa-stored"), Settings(step_limit=5), expected_seconds=6.0)
    assert (slow.outcome, slow.note) == ("too_slow", "a step would take about 6 s; the limit is 5 s")


@pytest.mark.parametrize("device", ["meta", "cpu:x", "tpu9"])
def test_a_device_that_cannot_be_measured_is_refused_before_anything_runs(device, tmp_path):
    with pytest.raises(ValueError, match=rf"device: expected .*cpu.*cuda.* got '?{device}"):
        compare(Settings(device=device), [], tmp_path / "r.json")


def test_the_command_measures_and_reports(tmp_path, capsys):
    arguments = ["bench", "--quick", "--systems", "sdpa-checkpoint", "--lengths", "--depths"]
    assert main([*arguments, "--threads", "1", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "[1/1]" in shown
    lines = [line for line in shown.splitlines() if line.startswith(("run ", "[1/1]", "SDPA"))]
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["outcome"] for run in content["runs"]] == ["measured"]
    assert "| SDPA + checkpointing per layer" in (tmp_path / "out" / "report.md").read_text()


def test_the_command_refuses_an_unknown_system(capsys):
    assert main(["bench", "--systems", "nothing-like-it"]) == 2
    assert "sdpa-checkpoint" in capsys.readouterr().err


def test_the_command_lists_the_systems(capsys):
    assert main(["bench", "--list"]) == 0
    assert "ours-window" in capsys.readouterr().out


def test_a_run_of_unknown_outcome_cannot_be_made():
    with pytest.raises(ValueError, match="outcome"):
        Run("compare", 0, "ours", SHAPE, "splendid")
