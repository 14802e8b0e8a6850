"""A run directory belongs to one run: a start that fails leaves nothing in it, and what others have there."""

import contextlib
import os

import pytest

from memory_efficient_attention_pytorch.training import run_directory, runs
from memory_efficient_attention_pytorch.training.config import TrainConfig
from memory_efficient_attention_pytorch.training.run_directory import RunDirectory
from memory_efficient_attention_pytorch.training.tracking import Callback


def a_run(path):
    """The files of somebody's run."""
    (path / "data").mkdir(parents=True)
    for name in ("config.toml", "tokenizer.json", "metrics.jsonl", "loss.png", "data/train.bin"):
        (path / name).write_text("mine")
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_directory_that_cannot_be_listed_keeps_its_run(tmp_path, monkeypatch):
    before = a_run(tmp_path)

    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "iterdir", unreadable)
    with pytest.raises(ValueError, match=r"out: cannot write to .*Permission denied"):
        RunDirectory.make(tmp_path, TrainConfig())
    assert {file: file.read_bytes() for file in before} == before


def test_a_directory_that_another_start_made_meanwhile_keeps_its_run(tmp_path, monkeypatch):
    path, lexists = tmp_path / "runs" / "1", os.path.lexists

    def then_made(name):
        there = lexists(name)
        if name == path and not there:
            a_run(path)
        return there

    monkeypatch.setattr(os.path, "lexists", then_made)
    with pytest.raises(ValueError, match=r"out: cannot write to .*File exists"):
        RunDirectory.make(path, TrainConfig())
    assert len([file for file in path.rglob("*") if file.is_file() and file.read_text() == "mine"]) == 5


def test_a_start_that_finds_another_at_work_takes_nothing_away(tmp_path, monkeypatch):
    """Two begin in the same empty directory, and the other is the first to lock it."""
    (tmp_path / "text.txt").write_text("a line of a text to learn\n" * 300)
    out, make = tmp_path / "shared", RunDirectory.make.__func__
    out.mkdir()
    config = TrainConfig(data=(str(tmp_path / "text.txt"),), dim=8, depth=1, heads=1, dim_head=8, seq_len=16)
    with contextlib.ExitStack() as of_the_other:

        def then_taken(cls, path, config):
            found = make(path=path, config=config, cls=cls)
            a_run(path)
            of_the_other.enter_context(RunDirectory(path).locked())
            return found

        monkeypatch.setattr(RunDirectory, "make", classmethod(then_taken))
        with pytest.raises(ValueError, match="another process is training"):
            runs.start_run(config, out, lambda main: Callback())
    assert len([file for file in out.rglob("*") if file.is_file() and file.read_text() == "mine"]) == 5


def test_a_run_killed_before_it_had_a_tokenizer_is_planned_for_the_vocabulary_to_come(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a line of a text to learn\n" * 300)
    config = TrainConfig(data=(str(tmp_path / "text.txt"),), vocab_size=300, memory_budget="1GiB")
    run, _ = RunDirectory.make(tmp_path / "run", config)
    planned = []

    def settle(accelerator, config, num_tokens, **rest):
        planned.append(num_tokens)
        raise ValueError("no more of it")

    monkeypatch.setattr(runs, "_settle", settle)
    with pytest.raises(ValueError, match="no more of it"):
        runs.resume_run(run.path, {}, lambda main: Callback())
    assert planned == [300]


def test_a_start_whose_configuration_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def written_and_not_flushed(path, content):
        path.write_text(content)
        raise OSError(5, "Input/output error", str(path.parent))

    monkeypatch.setattr(run_directory, "write_atomically", written_and_not_flushed)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b", tmp_path / "empty"):
        with pytest.raises(ValueError, match=r"out: cannot write to .*Input/output error"):
            RunDirectory.make(path, TrainConfig())
    assert [file.name for file in tmp_path.rglob("*")] == ["empty"]


def test_of_two_starts_in_one_empty_directory_the_second_changes_nothing(tmp_path, monkeypatch):
    """Both have found it empty."""
    first, second = TrainConfig(dim=64), TrainConfig(dim=128)
    with monkeypatch.context() as meanwhile:

        def once(path):
            meanwhile.setattr(type(tmp_path), "iterdir", lambda path: ())
            RunDirectory.make(path, first)
            return ()

        meanwhile.setattr(type(tmp_path), "iterdir", once)
        with pytest.raises(ValueError, match=r"out: cannot write to .*File exists"):
            RunDirectory.make(tmp_path, second)
    assert RunDirectory(tmp_path).load_config().dim == 64
