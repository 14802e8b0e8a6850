"""The examples run as they are, in small, and show what they say."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *options):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(options))


def test_a_class_is_found_far_from_where_it_is_asked_for(capsys):
    assert run("classify_bytes", "--tokens", "256", "--steps", "80", "--batch-size", "16") > 0.9
    assert "MiB" in capsys.readouterr().out


def test_a_reversible_network_keeps_the_same_at_any_depth(capsys):
    first, last = run("own_modules", "--tokens", "128", "--dim", "16", "--depth", "1", "--steps", "25")
    assert last < first / 2
    kept = [line.split(":")[1] for line in capsys.readouterr().out.splitlines() if "kept for backward" in line]
    stored, deeper, reversible, deeper_reversible = (float(text.split()[0]) for text in kept)
    assert deeper > 1.5 * stored
    assert deeper_reversible == reversible


def test_a_loss_without_logits_takes_a_part_of_the_memory():
    peaks = run("loss_in_your_loop", "--tokens", "1024", "--dim", "32", "--vocabulary", "16000", "--steps", "1")
    assert peaks["linear_cross_entropy"] < peaks["cross_entropy"] / 4


def test_packed_documents_are_as_each_by_itself(capsys):
    assert run("packed_documents", "--lengths", "90", "25", "70", "--heads", "4", "--width", "16") < 1e-4
    assert "3 documents in a row of 185 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_pictures(monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    cells = json.loads((EXAMPLES / "plan_train_plot.ipynb").read_text())["cells"]
    stored = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in stored)
    assert not any(output["output_type"] == "error" for output in stored)
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    small = code.replace("STEPS, SEQ_LEN = 60, 512", "STEPS, SEQ_LEN = 12, 64")
    assert small != code
    monkeypatch.chdir(tmp_path)
    names = {}
    try:
        exec(compile(small, "plan_train_plot.ipynb", "exec"), names)
    finally:
        plt.close("all")
    assert names["losses"][-1] < names["losses"][0]
