"""Medians, paired ratios, growth, the report and the figures, from runs whose answers are known."""

import json
import os

import pytest

from memory_efficient_attention_pytorch.benchmarking.figures import draw, round_numbers
from memory_efficient_attention_pytorch.benchmarking.report import comparison, full
from memory_efficient_attention_pytorch.benchmarking.results import Results, Run, begin
from memory_efficient_attention_pytorch.benchmarking.schedule import Settings
from memory_efficient_attention_pytorch.benchmarking.shape import Shape
from memory_efficient_attention_pytorch.benchmarking.summary import compared, growth, series, step_seconds, units
from memory_efficient_attention_pytorch.benchmarking.systems import REFERENCE, System, find_systems

BASE = Shape(seq_len=8192)


def a_run(system, units_, seconds, *, round_=0, experiment="compare", shape=BASE):
    return Run(
        experiment, round_, system, shape, "measured", peak_bytes=units_ * shape.unit_bytes, seconds=tuple(seconds)
    )


@pytest.fixture
def results():
    other = System("other", "another project's", build=None, versions=lambda: {"other": "2.0"})
    found = begin(Settings(base=BASE), [*find_systems(["ours", REFERENCE]), other])
    found.runs = [
        *(a_run("ours", 9, [seconds], round_=i) for i, seconds in enumerate((2.0, 3.0, 30.0))),
        *(a_run(REFERENCE, 30, [seconds], round_=i) for i, seconds in enumerate((4.0, 2.0, 20.0))),
        *(
            a_run("ours", 9, [n / 8192], experiment="length", shape=Shape(seq_len=n))
            for n in (1024, 4096, 16384, 32768)
        ),
        *(a_run(REFERENCE, 2 * d, [1.0], experiment="depth", shape=Shape(seq_len=4096, depth=d)) for d in (2, 8)),
        Run("compare", 0, "other", BASE, "failed", "it broke"),
        Run("length", 0, "other", Shape(seq_len=16384), "too_slow", "a step would take about 300 s"),
    ]
    return found


def test_ratios_are_paired_within_a_round(results):
    ours, reference, other = compared(results)
    assert ours.figures.seconds == 3.0
    # Rounds give 0.5, 1.5 and 1.5; the ratio of the medians, 0.75, would hide that two rounds of three were slower.
    assert ours.figures.time_ratio == 1.5
    assert ours.figures.memory_ratio == pytest.approx(0.3)
    assert (reference.figures.time_ratio, reference.figures.units) == (1.0, 30.0)
    assert other.figures is None
    assert other.missing == "failed: it broke"


def test_series_join_the_sweep_and_the_compared_shape(results):
    lengths = series(results, "seq_len", step_seconds)
    assert lengths["ours"] == [(1024, 0.125), (4096, 0.5), (8192, 3.0), (16384, 2.0), (32768, 4.0)]
    assert series(results, "depth", units)[REFERENCE] == [(2, 4.0), (8, 16.0)]
    assert lengths["other"] == []


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_growth_is_fitted_from_the_long_sequences_only(exponent):
    points = [(n, 3 * n**exponent) for n in (4096, 8192, 65536)]
    assert growth([(1024, 1e12), *points]) == pytest.approx(exponent)
    assert growth(points[:2]) is None


def test_results_survive_the_file_and_name_no_host(results, tmp_path):
    file = tmp_path / "new" / "results.json"
    results.save(file)
    assert Results.load(file) == results
    assert {"processor", "cores", "memory_bytes", "device"} <= results.machine.keys()
    assert results.versions.keys() == {"python", "torch", "ours", "other"}
    assert os.uname().nodename not in json.dumps([results.machine, results.versions])
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]
    file.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 1"):
        Results.load(file)


def test_the_report_says_what_was_left_out_and_why(results):
    text = full(results, ["memory-by-depth.png"])
    assert "![memory by depth](memory-by-depth.png)" in text
    assert "another project's at 8192 tokens, 4 layers, vocabulary 256: failed: it broke" in text
    assert "at 16384 tokens, 4 layers, vocabulary 256: too slow: a step would take about 300 s" in text
    row = next(line for line in comparison(results).splitlines() if line.startswith("| ours"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["9.0", "144", "3", "0.30×", "1.50×"]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_figures_are_drawn_where_there_is_something_to_see(results, tmp_path):
    pytest.importorskip("matplotlib")
    names = {path.name for path in draw(results, tmp_path)}
    assert names == {"memory-and-time.png", "memory-by-length.png", "time-by-length.png", "memory-by-depth.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    results.runs = [run for run in results.runs if run.experiment == "depth"]
    assert [path.name for path in draw(results, tmp_path / "depth")] == ["memory-by-depth.png"]


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [
        (2.9, 6.2, [2.5, 3, 3.5, 4, 4.5, 5, 6, 7]),
        (88, 1360, [70, 100, 150, 200, 300, 400, 500, 700, 1000, 1500]),
        (1.2, 140, [1, 2, 5, 10, 20, 50, 100, 200]),
        (0.0101, 0.0118, [0.01, 0.011, 0.012]),
        (10, 10, [10, 11]),
        (1e-3, 1e20, [10.0**exponent for exponent in range(-3, 21)]),
    ],
)
def test_a_logarithmic_axis_begins_and_ends_at_its_data_and_is_labelled_there(low, high, numbers):
    assert round_numbers(low, high) == pytest.approx(numbers)
