"""Whatever becomes of the output, and of memory: one line, no traceback."""

import os
import subprocess
import sys

import pytest

from memory_efficient_attention_pytorch import cli
from memory_efficient_attention_pytorch.training.files import RunError

TINY = ["--dim=16", "--depth=1", "--heads=2", "--dim-head=8", "--seq-len=16", "--batch-size=2", "--steps=2"]
OFTEN = ["--sample-every=1", "--sample-tokens=4", "--evaluation-windows=1"]


def mea(folder, redirected, *arguments, **environment):
    """The real command under a shell that redirects its output."""
    (folder / "text.txt").write_text("über — 漢字\n" * 100)
    command = f'exec "{sys.executable}" -m memory_efficient_attention_pytorch "$@" {redirected}'
    return subprocess.run(
        ["/bin/sh", "-c", command, "mea", *arguments],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_told_in_one_line(tmp_path):
    done = mea(tmp_path, "> /dev/full", "train", "--data", "text.txt", *TINY, *OFTEN)
    assert done.returncode == 1
    assert done.stderr.startswith("mea train: cannot write to standard output (No space left on device); go on with: ")
    assert done.stderr.endswith(": mea train --resume runs/1\n")
    assert done.stderr.count("\n") == 1
    done = mea(tmp_path, "", "train", "--resume", "--quiet")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["train", "--help"], ["plan"]], ids=" ".join)
def test_whatever_a_command_says_a_full_disk_is_told(tmp_path, arguments):
    done = mea(tmp_path, "> /dev/full", *arguments)
    assert done.returncode == 1
    assert done.stderr.endswith(": [Errno 28] No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_mistake_that_cannot_be_told_keeps_its_status(tmp_path):
    assert mea(tmp_path, "2> /dev/full", "train", "--stepz=3").returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_training_does_not_need_standard_output(tmp_path):
    done = mea(tmp_path, ">&-", "train", "--data", "text.txt", *TINY, *OFTEN)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/1/loss.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_narrow_encoding_replaces_what_it_lacks(tmp_path):
    done = mea(tmp_path, "", "train", "--data", "text.txt", *TINY, *OFTEN, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "?ber ? ??" in done.stdout


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_eighty_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*filter(None, [command]), "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: mea {command or 'COMMAND'}")
    assert [line for line in shown.splitlines() if len(line) > 80] == []


class Lacking(RuntimeError):
    pass


Lacking.__name__ = "OutOfMemoryError"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RunError("the loss became nan"), "the loss became nan"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
        (MemoryError(), "not enough memory for these sizes"),
        (Lacking("CUDA out of memory.\nTried to allocate"), "not enough memory for these sizes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory for these sizes"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_fails_for_a_reason_outside_is_one_line_and_status_1(monkeypatch, capsys, error, says):
    def fail(args):
        raise error

    monkeypatch.setattr("memory_efficient_attention_pytorch.cli.plan.run", fail)
    assert cli.main(["plan"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"mea plan: {says}")
    assert said.count("\n") == 1
    with pytest.raises(type(error)):
        cli.main(["plan", "--debug"])


def test_an_error_of_the_programs_own_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("memory_efficient_attention_pytorch.cli.plan.run", fail)
    with pytest.raises(RuntimeError, match="of ours"):
        cli.main(["plan"])
