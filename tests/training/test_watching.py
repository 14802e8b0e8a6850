"""What is told, kept, drawn and chosen for the machine."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from memory_efficient_attention_pytorch.cli.train_display import Lines, duration, indented, numbers
from memory_efficient_attention_pytorch.training.config import TrainConfig
from memory_efficient_attention_pytorch.training.interruption import Interruption
from memory_efficient_attention_pytorch.training.plot import plot_losses
from memory_efficient_attention_pytorch.training.resources import memory_now, memory_peak, pick_precision, resolve
from memory_efficient_attention_pytorch.training.watching import MetricsFile, Step, Validation, read_metrics

CPU = torch.device("cpu")


def step(number, loss=2.0):
    return Step(
        step=number,
        tokens=number * 10,
        loss=loss,
        bits_per_byte=loss / 0.7,
        learning_rate=1e-3,
        gradient_norm=1.0,
        tokens_per_second=12_345.0,
        seconds_left=3661.0,
        memory_now=100 << 20,
        memory_peak=200 << 20,
    )


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, first_step=-1)
    metrics.validation(Validation(0, 0, 5.5, 8.0, True))
    for number in (1, 2, 3):
        metrics.step(step(number))
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]

    metrics = MetricsFile(path, first_step=2)
    metrics.step(step(3, loss=1.5))
    metrics.sample(3, "a prompt", "its\ncontinuation 🙂")
    metrics.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 3]
    assert records[3]["loss"] == 1.5
    assert records[4] == {"step": 3, "prompt": "a prompt", "sample": "its\ncontinuation 🙂"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_is_told_once(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", first_step=-1)
    metrics.file.close()
    metrics.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        metrics.step(step(1))
    metrics.close()
    assert metrics.file.closed


def test_infinity_is_no_number_in_json(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", first_step=-1)
    metrics.step(dataclasses.replace(step(1), gradient_norm=float("inf")))
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["gradient_norm"] is None


def test_a_run_that_begins_anew_keeps_no_old_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    MetricsFile(path, first_step=-1).close()
    assert path.read_text() == ""


def test_the_picture_is_drawn_from_any_number_of_records(tmp_path):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    metrics.write_text("")
    plot_losses(metrics, picture)
    empty = picture.read_bytes()
    lines = [{"tokens": n, "bits_per_byte": 8 / n, "step": n} for n in range(1, 9)]
    lines += [{"tokens": 8, "validation_bits_per_byte": 2.0, "step": 8}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_losses(metrics, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.read_bytes() != empty
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_the_numbers_fit_a_terminal():
    assert numbers(step(7)) == "loss 2.000  2.86 bits/byte  12.3k tok/s  1:01:01 left  100/200 MiB"
    assert (duration(0), duration(59.6), duration(3599)) == ("0:00", "1:00", "59:59")


def test_a_sample_cannot_disturb_the_terminal():
    assert indented("a\x1b[31m\x07b\nc\t\u202e") == "    a·[31m·b\n    c\t·"


def test_plain_lines_come_now_and_then(capsys, monkeypatch, tmp_path):
    clock = [100.0]
    monkeypatch.setattr("memory_efficient_attention_pytorch.cli.train_display.time.monotonic", lambda: clock[0])
    lines = Lines()
    lines.reading(1, 2)
    lines.started("the plan", tmp_path, 0, 9)
    for number in range(1, 10):
        clock[0] += 4
        lines.step(step(number))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}: the plan"
    assert [line.split()[1] for line in said[1:]] == ["1/9", "4/9", "7/9"]


def test_precision_follows_the_machine_and_the_launcher(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert pick_precision(TrainConfig(), CPU) == "fp32"
    assert pick_precision(TrainConfig(precision="bf16"), CPU) == "bf16"
    with pytest.raises(ValueError, match="fp16 needs an accelerator"):
        pick_precision(TrainConfig(precision="fp16"), CPU)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert pick_precision(TrainConfig(), CPU) == "bf16"


def test_small_models_are_not_cut_and_large_ones_are():
    small = resolve(TrainConfig(), CPU)
    assert (small.head_chunks, small.ff_chunks, small.exact) == (1, 1, False)
    assert (small.reversible, small.keep_attention) == (True, False)
    shape = {"dim": 512, "heads": 8, "dim_head": 64, "seq_len": 65536, "batch_size": 1}
    large = resolve(TrainConfig(**shape), CPU)
    assert large.ff_chunks == 32
    assert large.heads % large.head_chunks == 0
    assert large.heads // large.head_chunks >= torch.get_num_threads()
    grouped = resolve(TrainConfig(**shape, kv_heads=2), CPU)
    assert grouped.kv_heads % grouped.head_chunks == 0
    asked = resolve(TrainConfig(**shape, head_chunks=1, ff_chunks=3, precision="bf16", keep_attention="cpu"), CPU)
    assert (asked.head_chunks, asked.ff_chunks, asked.exact, asked.keep_attention) == (1, 3, True, "cpu")


def test_memory_is_counted():
    before = memory_now(CPU)
    block = torch.ones(50 << 18)
    assert memory_now(CPU) >= before + 40 * (1 << 20)
    del block
    assert memory_peak(CPU) >= before + 40 * (1 << 20)


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal == signal.SIGTERM
        interruption._noted_at -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
