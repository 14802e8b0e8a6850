"""What a training step of a transformers model takes is known before it runs: as it is, checkpointed, and changed."""

import gc
import json
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak
from memory_efficient_attention_pytorch.cli import main
from memory_efficient_attention_pytorch.huggingface import make_memory_efficient, restore
from memory_efficient_attention_pytorch.huggingface.planning import AS_IT_IS, CHECKPOINTED, EFFICIENT, plan_step

from . import models
from .models import KINDS, small_model, tokens, wider_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("kind", "state", "length"),
    [
        ("Llama", AS_IT_IS, 1500),
        ("GPT2", CHECKPOINTED, 2000),
        pytest.param("Gemma3", EFFICIENT, 3000, marks=pytest.mark.slow),
    ],
)
def test_the_peak_is_what_the_step_takes(kind, state, length):
    model = wider_model(kind, length)
    make_memory_efficient(model)
    made = plan_step(model, seq_len=length, optimizer=None, threads=1).plans[state]
    start = made.timeline.breakdown(0)
    measured = measure_peak(
        f"{models.__file__}:build_step", {"kind": kind, "state": state, "length": length}, threads=1
    )
    total = start["parameters"] + start["gradients"] + measured.peak_bytes
    assert abs(made.peak_bytes / total - 1) < 0.05


@pytest.mark.parametrize(("kind", "device"), [("Llama", "cpu"), ("Llama", "cuda"), ("GPT2", "cpu"), ("Gemma3", "cpu")])
def test_no_mask_of_all_tokens_by_all_is_planned_where_none_is_made(kind, device):
    model = small_model(
        kind, torch.float32, max_position_embeddings=1 << 14, num_key_value_heads=4, sliding_window=1 << 20
    )
    make_memory_efficient(model)
    half, whole = (plan_step(model, seq_len=n, optimizer=None, device=device) for n in (8192, 16384))
    for state in half.plans:
        assert whole.plans[state].peak_bytes < 2.1 * half.plans[state].peak_bytes, state


def test_a_report_prints_what_was_planned_and_the_model_stays_what_it_is():
    model, ids = wider_model("Llama", 1024), tokens()
    report = make_memory_efficient(model)
    before = model(input_ids=ids, labels=ids).loss
    steps = report.plan(batch_size=2, seq_len=1024, device="cpu", optimizer=None)
    assert f"planned  {steps}" in str(report)
    assert "a step of 2 × 1,024 tokens: " in str(steps)
    assert steps.plans[AS_IT_IS].peak_bytes > steps.plans[CHECKPOINTED].peak_bytes > steps.after.peak_bytes
    assert torch.equal(model(input_ids=ids, labels=ids).loss, before)
    assert not any(p.is_meta for p in model.parameters())
    restore(model)
    with pytest.raises(ValueError, match="model: expected one that make_memory_efficient changed"):
        report.plan(seq_len=16)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="still alive"):
        report.plan(seq_len=16)


def test_a_model_that_was_checkpointed_already_is_planned_so():
    model = small_model("Llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert list(make_memory_efficient(model).plan(seq_len=64).plans) == [CHECKPOINTED, EFFICIENT]


@pytest.mark.slow
def test_more_tokens_than_positions_are_refused_where_each_has_a_vector():
    model = small_model("GPT2", max_position_embeddings=100)
    report = make_memory_efficient(model)
    with pytest.raises(ValueError, match="seq_len: expected at most the model's 100 positions, got 101"):
        report.plan(seq_len=101)
    assert report.plan(seq_len=16, budget="8MiB").longest[EFFICIENT] == 100


@pytest.mark.parametrize("kind", KINDS)
def test_without_contents_the_same_is_changed(kind):
    with torch.device("meta"):
        empty = getattr(transformers, type(small_model(kind)).__name__)(small_model(kind).config)
        found = make_memory_efficient(empty)
    expected = make_memory_efficient(small_model(kind))
    assert (found.changed, found.left) == (expected.changed, expected.left)


def directory(tmp_path, kind, **options):
    small_model(kind, **options).config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_command_plans_a_directory(tmp_path, capsys):
    command = ["plan", "--model", directory(tmp_path, "Llama"), "--seq-len", "100", "--device", "cpu"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM of " in shown
    assert "trained with adamw on 1 × 100 tokens, device cpu" in shown
    assert all(state in shown for state in (AS_IT_IS, CHECKPOINTED, EFFICIENT))
    assert "longest" not in shown
    assert main([*command, "--budget", "6MiB", "--optimizer", "sgd", "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "longest sequence within 6 MiB" in shown
    assert "up to 128 tokens" in shown
    assert "after the call the step fits" in shown
    assert main([*command, "--budget", "64KiB", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["plans"][EFFICIENT]["fits"] is False
    assert found["longest"] == dict.fromkeys(found["plans"], 0)


def test_mistakes_beside_a_directory_are_told_in_a_line(tmp_path, capsys, monkeypatch):
    def told(*options):
        assert main(["plan", "--device", "cpu", *options]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        return shown.err.strip().splitlines()[-1]

    model = directory(tmp_path / "a", "Llama")
    assert "--model needs --seq-len" in told("--model", model)
    for option in (["--depth", "2"], ["--generate"], ["--reversible"]):
        assert f"{option[0]} does not go together with --model" in told("--model", model, "--seq-len", "8", *option)
    assert "config.json" in told("--model", str(tmp_path / "none"), "--seq-len", "8")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    assert "nothing" in told("--model", str(tmp_path), "--seq-len", "8")
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in told("--model", str(tmp_path), "--seq-len", "8")
    experts = directory(tmp_path / "b", "GptOss")
    assert "cannot be dry-run" in told("--model", experts, "--seq-len", "8")
    for name in [name for name in sys.modules if name.startswith("memory_efficient_attention_pytorch.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    expected = "transformers is not installed: pip install 'memory-efficient-attention-pytorch[huggingface]'"
    assert expected in told("--model", model, "--seq-len", "8")
