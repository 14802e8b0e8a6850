"""What is measured, kept in files and drawn."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from memory_efficient_attention_pytorch.training.plot import picture, plot_losses
from memory_efficient_attention_pytorch.training.tracking import (
    MetricsFile,
    Sample,
    Step,
    TensorBoardFile,
    Validation,
    read_metrics,
)


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
    metrics.log(Validation(0, 0, 5.5, 8.0, True))
    for number in (1, 2, 3):
        metrics.log(step(number))
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]

    metrics = MetricsFile(path, first_step=2)
    metrics.log(step(3, loss=1.5))
    metrics.log(Sample(3, "a prompt", "its\ncontinuation 🙂"))
    metrics.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 3]
    assert records[3]["loss"] == 1.5
    assert records[4] == {"step": 3, "prompt": "a prompt", "sample": "its\ncontinuation 🙂"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_is_told_once(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", first_step=-1)
    metrics.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        metrics.log(step(1))
    metrics.close()


def test_metrics_that_were_taken_away_begin_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, first_step=-1)
    metrics.log(step(1))
    path.unlink()
    assert read_metrics(path) == []
    metrics.log(step(2))
    assert [record["step"] for record in read_metrics(path)] == [2]


def test_what_is_no_record_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[]\n7\n{"loss": 1.0}\n{"step": "2"}\n\xff\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_infinity_is_no_number_in_json(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", first_step=-1)
    metrics.log(dataclasses.replace(step(1), gradient_norm=float("inf")))
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


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [([0], ["0"]), ([0, 800], ["0", "100"]), ([0, 150_000], ["0", "20 k"]), ([0, 6 * 10**9], ["0", "1 B"])],
    ids=str,
)
def test_the_picture_begins_at_zero_and_writes_each_validation_once(tokens, shown):
    pytest.importorskip("matplotlib")
    figure = picture([{"tokens": n, "validation_bits_per_byte": 8.0} for n in tokens])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert [label for label in labels if label][: len(shown)] == shown
    assert [text.get_text() for text in axes.texts] == ["8.00"] * len(tokens)


def test_tensorboard_gets_every_kind_of_record_and_a_run_that_goes_on_purges(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step in (-1, 1):
        board = TensorBoardFile(tmp_path, first_step)
        board.log(Validation(max(0, first_step), 0, 5.5, 8.0, True))
        for number in range(first_step + 1 or 1, 4):
            board.log(step(number, loss=number + first_step))
        board.log(Sample(3, "a prompt", "its continuation"))
        board.close()
    read = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in read.Scalars("train/loss")] == [(1, 0.0), (2, 3.0), (3, 4.0)]
    assert {"train/memory_now", "validation/loss", "validation/bits_per_byte"} <= set(read.Tags()["scalars"])
    assert read.Tags()["tensors"] == ["sample/text_summary"]
