"""What a person sees of a run."""

import sys
from pathlib import Path

import pytest

from memory_efficient_attention_pytorch.cli.terminal import fitted, wrapped
from memory_efficient_attention_pytorch.cli.train_display import Lines, Live, duration, indented, numbers
from memory_efficient_attention_pytorch.training.tracking import Sample, Validation
from tests.training.test_tracking import step


def test_the_numbers_fit_a_terminal():
    assert numbers(step(7)) == "loss 2.000  2.86 bits/byte  1:01:01 left  12.3k tok/s  100/200 MiB"
    assert numbers(step(7), room=40) == "loss 2.000  2.86 bits/byte  1:01:01 left"
    assert numbers(step(7), room=5) == "loss 2.000"
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
        lines.log(step(number))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}: the plan"
    assert [line.split()[1] for line in said[1:]] == ["1/9", "4/9", "7/9"]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_live_display_fits_its_terminal_and_cuts_nothing(capsys, monkeypatch, tmp_path, columns):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    live = Live()
    live.started("one fact; " * 20 + "\n  attention: " + "a long reason " * 12, Path("runs/1"), 0, 123_456)
    live.log(Validation(0, 0, 5.5, 8.0, True))
    live.log(Sample(100, "a prompt", "and what follows it " * 20 + "\nnext"))
    live.log(step(12_345))
    live.close()
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= columns for line in lines)
    assert not [line for line in lines if "…" in line]
    assert "loss 2.000" in next(line for line in lines if line.startswith("12345/123456 "))
    started = next(i for i, line in enumerate(lines) if line.startswith("  attention:"))
    assert columns == 200 or lines[started + 1].startswith("    "), "what goes on stands further in"
    sample = next(i for i, line in enumerate(lines) if line.startswith("sample at step 100"))
    assert "a prompt|and" in lines[sample + 1]
    assert lines[sample + 2].startswith("    ")


def test_text_is_broken_for_a_terminal_only(capsys, monkeypatch):
    text = "first: " + "word " * 30 + "\n  second: /a/path/that/is/longer/than/twenty/columns/and/stays/whole"
    broken = wrapped(text, 40).splitlines()
    assert all(len(line) <= 40 for line in broken if "/" not in line)
    assert broken[1].startswith("  word")
    assert broken[-1] == "    /a/path/that/is/longer/than/twenty/columns/and/stays/whole"
    assert fitted(text) == text
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert fitted(text) == wrapped(text, 40)


def test_a_note_is_no_markup(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    live = Live()
    live.started("the plan", tmp_path, 0, 9)
    live.notice("runs[/b]/[lr=3] holds no checkpoint")
    live.close()
    assert "note: runs[/b]/[lr=3] holds no checkpoint" in capsys.readouterr().out
