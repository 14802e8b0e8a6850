"""What a person sees of a run."""

from memory_efficient_attention_pytorch.cli.train_display import Lines, duration, indented, numbers
from tests.training.test_tracking import step


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
        lines.log(step(number))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}: the plan"
    assert [line.split()[1] for line in said[1:]] == ["1/9", "4/9", "7/9"]
