"""`mea plan`: a table to read, JSON to use, a picture, and mistakes told in one line."""

import json
import sys

import pytest

from memory_efficient_attention_pytorch import plan
from memory_efficient_attention_pytorch.cli import main
from memory_efficient_attention_pytorch.cli.plan_picture import picture
from memory_efficient_attention_pytorch.planner import CATEGORIES

SMALL = [
    "plan",
    "--dim",
    "64",
    "--depth",
    "2",
    "--heads",
    "4",
    "--dim-head",
    "16",
    "--seq-len",
    "2048",
    "--batch-size",
    "1",
    "--device",
    "cpu",
]


def test_table(capsys):
    assert main(SMALL) == 0
    shown = capsys.readouterr().out
    assert "causal Transformer of 2 blocks, 64 wide, 4 heads of 16" in shown
    assert "1 × 2,048 tokens, device cpu" in shown
    for category in (
        "parameters",
        "gradients",
        "optimizer",
        "streams",
        "attention",
        "feed-forward",
        "kernel workspace",
    ):
        assert category in shown
    assert "TFLOP a step" in shown
    assert "\nthe peak is in the " in shown
    assert "budget" not in shown


def test_every_line_fits_eighty_columns_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    settings = ["--reversible", "--no-exact", "--ff-chunks", "8", "--head-chunks", "1", "--loss-chunk-size", "128"]
    assert main([*SMALL, *settings, "--seq-len", "65536", "--budget", "10MiB", "--longest"]) == 1
    shown = capsys.readouterr().out
    assert "the step is " in shown
    assert "offloading" in shown
    assert [line for line in shown.splitlines() if len(line) > 80] == []


def test_budget_chooses_settings_and_says_what_each_saves(capsys):
    # In 12.5 MiB what is kept of attention does not fit, whichever library multiplies.
    assert main([*SMALL, "--budget", "12.5MiB"]) == 0
    shown = capsys.readouterr().out
    assert "store everything" in shown
    assert "reversible blocks" in shown
    assert "reversible=True" in shown
    assert "budget 12.5 MiB: the step fits, with" in shown


def test_what_does_not_fit_has_status_1_and_says_what_would(capsys):
    settings = ["--reversible", "--no-exact", "--ff-chunks", "8", "--head-chunks", "1", "--loss-chunk-size", "128"]
    assert main([*SMALL, *settings, "--budget", "10MiB"]) == 1
    shown = capsys.readouterr().out
    assert "too large" in shown
    assert "would fit" in shown
    assert "offloading would save nothing" in shown


def test_attention_is_kept_where_it_is_asked_for(capsys):
    """On the device it takes memory; in host memory none of the device's; either way backward computes less."""

    def told(*options):
        assert main([*SMALL, "--device", "cuda", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    default, off, on, host = (
        told(*options) for options in ([], ["--no-keep-attention"], ["--keep-attention"], ["--keep-attention", "cpu"])
    )
    assert [made["config"].get("keep_attention") for made in (default, off, on, host)] == [None, False, True, "cpu"]
    assert default["peak_bytes"] == off["peak_bytes"] == host["peak_bytes"] < on["peak_bytes"]
    assert default["flops"] == off["flops"] > on["flops"] == host["flops"]


def test_settings_that_were_given_are_shown_and_kept_within_a_budget(capsys):
    assert main([*SMALL, "--keep-attention", "cpu", "--head-chunks", "2"]) == 0
    assert "\nsettings: keep_attention=cpu, head_chunks=2\n" in capsys.readouterr().out
    given = ["--reversible", "--no-exact", "--keep-attention", "--ff-chunks", "8", "--head-chunks", "1"]
    assert main([*SMALL, *given, "--loss-chunk-size", "128", "--budget", "10MiB"]) == 1
    shown = capsys.readouterr().out
    everything = "reversible=True, exact=False, keep_attention=True, ff_chunks=8, head_chunks=1, loss_chunk_size=128"
    assert f"\nsettings: {everything}\n" in shown
    assert "would fit" in shown
    assert "offloading" not in shown, "attention's outputs are kept, and could be elsewhere"


def test_json_and_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    assert main([*SMALL, "--json", "--plot", str(picture), "--budget", "64MiB", "--longest"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["peak_bytes"] == sum(told["breakdown"].values()) <= told["budget"] == 64 * 2**20
    assert told["fits"] is True
    assert told["longest"] > 2048
    assert set(told["peak"]) == {"phase", "module", "name"}
    assert told["options"][-1]["settings"] == told["settings"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_the_picture_tells_each_colour_even_of_what_is_nothing_at_the_peak():
    pytest.importorskip("matplotlib")
    made = plan({"num_tokens": 16, "dim": 16, "depth": 2, "heads": 2, "causal": True}, batch_size=1, seq_len=64)
    live = dict(zip(CATEGORIES, made.timeline.live.max(axis=0), strict=True))
    shown = [name for name, most in live.items() if most]
    assert any(made.breakdown[name] == 0 for name in shown)
    over_time, at_peak = picture(made).axes
    assert [label.get_text() for label in at_peak.get_yticklabels()] == shown
    (squares,) = at_peak.collections
    layers = {tuple(layer.get_facecolor()[0]) for layer in over_time.collections}
    assert {tuple(colour) for colour in squares.get_facecolors()} <= layers
    assert len(squares.get_facecolors()) == len(shown)


def test_generation(capsys):
    assert main([*SMALL, "--generate"]) == 0
    shown = capsys.readouterr().out
    assert "generating after 1 × 2,048 tokens" in shown


def test_budget_from_the_machine(capsys):
    assert main([*SMALL, "--budget", "auto"]) == 0
    assert "fits, with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "8XB"], "mea plan: budget: expected a size above zero such as 8GB, 8GiB or 8000M, got '8XB'"),
        (["--seq-len", "0"], "mea plan: seq_len: expected a positive integer, got 0"),
        (["--seq-len", str(2**63 - 1)], "mea plan: batch_size and seq_len make"),
        (["--batch-size", str(2**63)], "mea plan: batch_size and seq_len make"),
        (["--dim", str(2**63 - 1)], "mea plan: dim, ff_mult, heads and dim_head make"),
        (["--depth", str(2**63 - 1)], "mea plan: depth must be at most 65536"),
        (["--num-tokens", str(2**63 - 1)], "mea plan: num_tokens must be at most"),
        (["--shards", str(2**63 - 1)], "mea plan: shards must be at most 65536"),
        (["--context", str(2**63)], "mea plan: context must be at most 65536"),
        (["--dim", "-3"], "mea plan: dim: expected a positive integer, got -3"),
        (["--precision", "int8"], "mea plan: argument --precision: invalid choice: 'int8'"),
        (["--keep-attention", "gpu"], "mea plan: argument --keep-attention/--no-keep-attention: invalid choice: 'gpu'"),
        (
            ["--no-keep-attention", "cpu"],
            "mea plan: argument --keep-attention/--no-keep-attention: --no-keep",
        ),
        (["--longest"], "mea plan: --longest needs a --budget"),
        (["--optimizer", "lion"], "mea plan: optimizer: expected one of adamw"),
        (["--budget", "auto", "--device", "tpu9"], "mea plan: device: expected cpu, cuda or another device"),
        (["--plot", ""], "mea plan: --plot: expected the name of a file, got ''"),
        (
            ["--heads", "2", "--kv-heads", "4", "--budget", "1GiB"],
            "mea plan: kv_heads: expected a divisor",
        ),
        (["--plot", "."], "mea plan: --plot: expected the name of a file, got '.'"),
        (["--plot", "/dev/null/memory.png"], "mea plan: --plot: cannot write to /dev/null/memory.png"),
        (["--budget", "auto", "--device", "xpu"], "mea plan: --budget: the free memory of device 'xpu' is not known"),
        (["--sequence", "8"], "mea plan: unknown argument --sequence"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys):
    assert main([*SMALL, *options]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(message)
    assert told.err.count("\n") == 1
