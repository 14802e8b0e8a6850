"""benchmarks/gpu.py on a CPU: its cases agree with PyTorch's, what it writes, what it says without CUDA."""

import json
import subprocess
import sys

import pytest
import torch

from memory_efficient_attention_pytorch import dot_product_attention
from tests.benchmarking.scripts import FOLDER, load_benchmark

CASES = ("plain", "causal", "window", "documents", "alibi", "dropout", "bias gradient")
SAME = [case for case in CASES if case != "dropout"]


@pytest.fixture
def gpu():
    return load_benchmark("gpu")


def test_without_cuda_it_says_so_in_a_line(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1
    assert "no CUDA device" in printed.err


def test_a_tiny_run_writes_figures_and_a_table(gpu, tmp_path):
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())
    assert [line["case"] for line in found["attention"]] == list(CASES)
    for line in found["attention"]:
        assert line["ours"]["milliseconds"] > 0
        assert line["sdpa"]["milliseconds"] > 0
    assert [line["tokens"] for line in found["steps"]] == list(gpu.TINY.step_tokens)
    assert {"date", "machine", "versions"} <= found.keys()
    table = written.with_suffix(".md").read_text()
    assert all(f"| {case} |" in table for case in CASES)


def test_what_there_is_no_time_for_is_left_out_with_the_reason(gpu, tmp_path):
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path), "--minutes", "0"]) == 0
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())
    assert all("left_out" in line["ours"] for line in found["attention"])
    assert all("left_out" in line for line in found["steps"])


@pytest.mark.parametrize("case", SAME)
def test_both_compute_the_same(gpu, case):
    torch.manual_seed(0)
    size = gpu.TINY
    found = dict(gpu.cases(size, "cpu"))[case]
    q, k, v = torch.randn(3, 1, size.heads, size.tokens, size.width)
    torch.testing.assert_close(dot_product_attention(q, k, v, **found.ours), found.sdpa()(q, k, v))


@pytest.mark.parametrize("case", SAME[1:])
def test_flex_attention_is_asked_the_same(gpu, case):
    size = gpu.TINY
    found = dict(gpu.cases(size, "cpu"))[case]
    heads, places = torch.arange(size.heads)[:, None, None], torch.arange(size.tokens)
    i, j, b = places[:, None], places[None], torch.zeros((), dtype=torch.long)
    q, k, v = torch.randn(3, 1, size.heads, size.tokens, size.width)
    scores = q @ k.mT * size.width**-0.5
    if found.score_mod is not None:
        scores = found.score_mod(scores, b, heads, i, j)
    if found.mask_mod is not None:
        scores = scores.masked_fill(~found.mask_mod(b, heads, i, j), float("-inf"))
    torch.testing.assert_close(dot_product_attention(q, k, v, **found.ours), scores.softmax(-1) @ v)


def test_it_needs_pytorch_alone(tmp_path):
    """Where nothing else is installed: the packages of training are taken away."""
    away = "import sys; sys.modules |= dict.fromkeys(('safetensors', 'accelerate', 'transformers', 'hypothesis'))"
    run = f"import runpy; sys.argv = ['gpu', '--device', 'cpu', '--minutes', '0', '--output', {str(tmp_path)!r}]"
    path = str(FOLDER / "gpu.py")
    code = f"{away}; {run}; runpy.run_path({path!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.json"))


class Hours:
    """A clock of steps that take a second for 65536 tokens, and a while for the first of all."""

    def __init__(self, left):
        self.left, self.taken = left, iter([0.8, 1.0, 16.0, 256.0])

    def seconds(self, work):
        work()
        taken = next(self.taken)
        self.left -= taken
        return taken

    def peak(self, work):
        return 2**20


@pytest.mark.parametrize(("left", "measured"), [(540, 3), (200, 2), (40, 2), (25, 0)])
def test_steps_are_foreseen_from_measured_ones_and_not_from_the_first_that_loads_everything(gpu, left, measured):
    size, told = gpu.TINY._replace(step_tokens=(2**16, 2**18, 2**20)), []
    gpu.steps(size, "cpu", Hours(left), told.append)
    told = [line for line in told if line["tokens"] >= 2**16]
    assert [line.get("seconds") for line in told] == [1.0, 16.0, 256.0][:measured] + [None] * (3 - measured)
    if measured == 2:
        assert told[2]["left_out"] == "some 307 s more would be needed"


def test_what_fails_loses_nothing_else(gpu, monkeypatch, tmp_path, capsys):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu, "Transformer", broken)
    monkeypatch.setattr(gpu, "select_backend", broken)
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "gpu: steps ended early: RuntimeError: no kernel image" in capsys.readouterr().err
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())
    assert [line["case"] for line in found["attention"]] == list(CASES)
    assert all(line["way"] == "RuntimeError" for line in found["attention"])
