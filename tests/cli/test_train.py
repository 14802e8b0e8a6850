"""`mea train` as a person runs it: the real command in a process of its own, in an empty directory."""

import fcntl
import functools
import gzip
import json
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.cli import train_command

TINY = ["--dim=16", "--depth=2", "--heads=2", "--dim-head=8", "--seq-len=16", "--batch-size=2", "--steps=6"]
OFTEN = [
    "--evaluate-every=3",
    "--checkpoint-every=2",
    "--sample-every=3",
    "--sample-tokens=8",
    "--evaluation-windows=4",
]


@pytest.fixture
def mea(here):
    return functools.partial(train_command.mea, here)


@pytest.fixture
def text(here):
    path = here / "text.txt"
    path.write_text("".join(f"line {i} of a text to learn\n" for i in range(300)))
    return path


def refused(result, *parts):
    """Exit status 2 and one line that says these things, no traceback."""
    error = result.error
    assert result.status == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("mea train: ")
    for part in parts:
        assert part in error


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_a_file_leaves_everything_and_says_it(mea, text, here):
    result = mea("train", "--data", "text.txt", *TINY, *OFTEN)
    assert result.status == 0, result.error
    run = here / "runs" / "1"
    assert {path.name for path in run.iterdir()} >= {"config.toml", "data", "checkpoints", "metrics.jsonl", "loss.png"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    steps = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in steps] == [32, 64, 96, 128, 160, 192]
    assert all(0 < record["memory_now"] <= record["memory_peak"] for record in steps)
    validations = [record for record in records(run) if "validation_loss" in record]
    assert [record["step"] for record in validations] == [0, 3, 6]
    size = text.stat().st_size
    # One token a byte, and one that ends the document.
    bits = validations[-1]["validation_loss"] / math.log(2) * (size + 1) / size
    assert validations[-1]["validation_bits_per_byte"] == pytest.approx(bits)
    assert [record["step"] for record in records(run) if "sample" in record] == [3, 6]

    out = result.out
    for part in (
        "; 1 CPU thread; fp32\n",
        "attention: ",
        "reversal: off, activations are stored",
        " for a step, the fastest settings that fit in the ",
        " (store everything; the leanest would take ",
        "pieces: ",
        "to validate on (the end of the document)",
        "sample at step 6",
    ):
        assert part in out
    for part in (
        "done: 6 steps, 192 tokens",
        "bits per byte, best",
        "MiB at the peak",
        "loss.png",
        "mea generate runs/1",
    ):
        assert part in out


def test_text_from_standard_input_with_a_tokenizer_trained_on_it(mea, text, here):
    result = mea("train", "--data", "-", "--vocab-size", "300", *TINY, "--quiet", stdin=text.read_bytes())
    assert result.status == 0, result.error
    assert result.out == result.error == ""
    run = here / "runs" / "1"
    assert not (run / "standard-input.txt").exists()
    corpus = json.loads((run / "data" / "corpus.json").read_text())
    assert corpus["dtype"] == "uint16"
    assert corpus["bytes_per_token"] > 1.5

    result = mea(
        "train", "--data", "text.txt", "--tokenizer", "runs/1/tokenizer.json", "--out", "mine/a", *TINY, "--quiet"
    )
    assert result.status == 0, result.error
    assert json.loads((here / "mine/a/data/corpus.json").read_text()) == corpus


def test_data_named_twice_is_both(mea, text, here):
    (here / "more.txt").write_text("more of it\n" * 30)
    result = mea("train", "--data", "text.txt", *TINY, "--quiet", "--data", "more.txt", "-", stdin=b"and more\n" * 30)
    assert result.status == 0, result.error
    assert json.loads((here / "runs/1/data/corpus.json").read_text())["documents"] == 3


def test_options_from_toml_with_the_command_line_going_first(mea, text, here):
    packed = here / "packed"
    packed.mkdir()
    (packed / "text.txt.gz").write_bytes(gzip.compress(text.read_bytes()))
    (here / "c.toml").write_text(
        'data = ["packed"]\ndim = 16\ndepth = 1\nheads = 2\ndim_head = 8\nseq_len = 16\nbatch_size = 2\n'
        "steps = 9\nsample_every = 0\n"
    )
    result = mea("train", "--config", "c.toml", "--steps", "2", "--tensorboard", "--accumulation", "2", "--quiet")
    assert result.status == 0, result.error
    run = here / "runs" / "1"
    assert [record["tokens"] for record in records(run) if "loss" in record] == [64, 128]
    assert list((run / "tensorboard").glob("events.*"))
    assert "steps = 2 " in (run / "config.toml").read_text()

    # What was trained decides: a finished run has nothing left to do, more steps go on from there.
    again = mea("train", "--resume")
    assert again.status == 0
    assert "done: 2 steps" in again.out
    more = mea("train", "--resume", "runs/1", "--steps", "3", "--quiet")
    assert more.status == 0, more.error
    assert [record["step"] for record in records(run) if "loss" in record] == [1, 2, 3]
    refused(mea("train", "--resume", "runs/1", "--dim", "32"), "dim is 16 in runs/1 and cannot change within a run")
    refused(mea("train", "--out", "runs/1"), "runs/1 is not empty", "mea train --resume runs/1")
    refused(
        mea("train", "--resume", "runs/1", "--steps", "4", "--batch-size", "3"), "took 4 windows a step", "now take 6"
    )
    config = run / "config.toml"
    assert "steps = 3 " in config.read_text()
    assert "batch_size = 2 " in config.read_text()
    config.write_text(config.read_text().replace("dim = 16", "dim = 18"))
    refused(mea("train", "--resume", "runs/1"), "step-00000003 are not those of the model in the run's config.toml")
    config.write_text(config.read_text().replace("format = 1", "format = 99"))
    refused(mea("train", "--resume", "runs/1"), "format 99", "this version reads format 1")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data", "nowhere"], ["there is no file or directory", "nowhere"]),
        (["--data", "empty.txt"], ["the text is empty"]),
        (["--data", "short.txt"], ["too short", "--seq-len"]),
        (["--data", "/proc/self/mem"], ["cannot read /proc/self/mem: Input/output error"]),
        (["--data", ""], ["data: expected names of files and directories, got an empty one"]),
        (["--out", ""], ["--out: expected the name of a directory, got an empty one"]),
        (["--data", "folder"], ["the directory", "folder has no files"]),
        (["--data", "-"], ["standard input is empty"]),
        (["--data", "latin.txt", "--vocab-size", "300"], ["latin.txt is not UTF-8 at byte 1", "train on bytes"]),
        (["--tokenizer", "short.txt"], ["short.txt is not a file of the tokenizers library"]),
        (["--tokenizer", "a", "--vocab-size", "300"], ["contradict"]),
        (["--config", "bad.toml"], ["unknown key 'learning_rat'", "did you mean learning_rate?"]),
        (["--config", "nowhere.toml"], ["cannot read the configuration nowhere.toml"]),
        (["--exact", "--no-reversible"], ["exact", "contradict"]),
        (["--resume", "folder"], ["folder is not a run directory"]),
        (["--resume"], ["no run in runs/"]),
        (["--resume", ""], ["--resume: expected the name of a directory, got an empty one"]),
        (["--resume", "x", "--out", "y"], ["--resume and --out contradict"]),
        (["--out", "short.txt/run"], ["cannot write to short.txt/run: Not a directory", "--out"]),
        (["--precision", "fp16", "--device", "cpu"], ["fp16 needs an accelerator"]),
        (["--stepz", "3"], ["unknown argument --stepz (did you mean --steps?)"]),
        (["--steps", "many"], ["--steps: invalid int value: 'many'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_is_refused_in_one_line(mea, here, arguments, parts):
    (here / "folder").mkdir()
    (here / "empty.txt").touch()
    (here / "short.txt").write_text("short")
    (here / "latin.txt").write_bytes("längst".encode("latin-1"))
    (here / "bad.toml").write_text("learning_rat = 1")
    before = sorted(here.rglob("*"))
    if "--data" not in arguments and "--resume" not in arguments:
        arguments = ["--data", "short.txt", *arguments]
    refused(mea("train", *arguments), *parts)
    assert sorted(here.rglob("*")) == before


def test_a_refused_run_takes_away_what_it_made_and_no_more(mea, here):
    (here / "short.txt").write_text("short")
    (here / "empty").mkdir()
    for out in ("a/b/c", "empty", "a/../d"):
        refused(mea("train", "--data", "short.txt", *TINY, "--out", out), "too short")
    assert {path.name for path in here.iterdir()} == {"short.txt", "empty"}


def test_the_text_of_a_folder_is_not_what_its_runs_left(mea, text, here):
    """`--data .`, again and again: the runs are left out."""
    for number in (1, 2):
        result = mea("train", "--data", ".", *TINY, "--quiet")
        assert result.status == 0, result.error
        corpus = json.loads((here / f"runs/{number}/data/corpus.json").read_text())
        assert corpus["documents"] == 1
        assert corpus["train_tokens"] + corpus["validation_tokens"] == text.stat().st_size + 1


@pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes on Linux")
def test_names_that_are_no_utf8(text, here):
    folder = os.fsencode(here) + b"/l\xe4ngst"
    os.mkdir(folder)
    os.rename(text, folder + b"/\xfc.txt")
    there, name = Path(os.fsdecode(folder)), os.fsdecode(b"\xfc.txt")
    tokenizer = ["--vocab-size", "300"]
    result = train_command.mea(there, "train", "--data", name, *TINY, *tokenizer, "--out", os.fsdecode(b"r\xfcn"))
    assert result.status == 0, result.error
    result = train_command.mea(there, "train", "--data", name, "--resume", os.fsdecode(b"r\xfcn"), "--steps=7")
    assert result.status == 0, result.error
    assert "next: mea generate $'r\\xfcn'" in result.out
    result = train_command.mea(there, "generate", os.fsdecode(b"r\xfcn"), "--prompt", "line", "--tokens=4")
    assert result.status == 0, result.error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_cannot_be_read_twice(mea, here):
    os.mkfifo(here / "pipe")
    result = mea("train", "--data", "pipe", "--vocab-size", "300", *TINY)
    refused(result, "pipe can be read only once", "mea train --data -")


def test_a_terminal_shows_a_bar(here, text):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    running = train_command.Mea(here, "train", "--data", "text.txt", *TINY, *OFTEN, terminal=os.ttyname(theirs))
    shown = b""
    while running.process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 1 << 16)
    assert running.finish(read_output=False).status == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "\n").splitlines()
    last = [line for line in lines if line.startswith("6/6 ")][-1]
    for part in ("━━━", "loss ", "bits/byte", "tok/s", "0:00 left", "MiB"):
        assert part in last
    assert all(len(line) <= 90 for line in lines)
    for part in ("validation at step 6", "sample at step 6, after the |:", "done: 6 steps"):
        assert any(part in line for line in lines)


def test_debug_shows_the_traceback(mea):
    result = mea("train", "--data", "nowhere", "--debug")
    assert result.status != 0
    assert "Traceback" in result.error
    assert "ValueError: data: there is no file or directory" in result.error


@pytest.mark.parametrize("command", [["mea"], [sys.executable, "-m", "memory_efficient_attention_pytorch"]])
def test_the_installed_command_helps(command, tmp_path):
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}

    def call(*arguments):
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    helped = call("--help")
    assert helped.returncode == 0
    assert "train a Transformer on text" in helped.stdout
    wrong = call("trian")
    assert wrong.returncode == 2
    assert wrong.stderr == "mea: unknown command 'trian' (did you mean train?); mea --help lists them\n"
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option(mea):
    result = mea("train", "--help")
    assert result.status == 0
    for option in ("--resume", "--config", "--learning-rate", "--no-reversible", "--debug"):
        assert option in result.out
