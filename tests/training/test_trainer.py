"""The loop, held against plain PyTorch and against itself."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file

from memory_efficient_attention_pytorch.training import load_run
from memory_efficient_attention_pytorch.training.config import TrainConfig
from memory_efficient_attention_pytorch.training.data import Batches, Corpus
from memory_efficient_attention_pytorch.training.model import build_model
from memory_efficient_attention_pytorch.training.optimizer import adamw, learning_rate
from memory_efficient_attention_pytorch.training.run_directory import RunDirectory
from memory_efficient_attention_pytorch.training.runs import resume_run, start_run
from memory_efficient_attention_pytorch.training.tracking import Callback, Step, Validation, read_metrics
from tests.agreement import apart

TINY = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "seq_len": 16, "device": "cpu", "evaluation_windows": 4}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text to learn\n" for i in range(300)))
    return str(path)


def train(text, out, callback=None, **options):
    config = TrainConfig(**(TINY | {"data": (text,), "sample_every": 0, "steps": 4, "warmup_steps": 2} | options))
    return start_run(config, out, lambda main: callback or Callback())


def weights(outcome):
    return load_file(outcome.run.checkpoints.find().files("model")[0])


def test_the_loop_is_plain_training(text, tmp_path):
    """Gradients averaged over accumulated batches, clipped, AdamW, warm-up and cosine: written out once more."""
    outcome = train(text, tmp_path / "run", batch_size=2, accumulation=3, clip=0.5)
    config = outcome.config
    tokens = Corpus(outcome.run.data).train
    torch.manual_seed(config.seed)
    model = build_model(config, 256)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.95)
    )
    rates = [3e-3 * 1 / 2, 3e-3, 3e-3, 3e-3 * 0.1]
    for step, rate in enumerate(rates):
        batches = list(Batches(tokens, config)(step))
        assert len(batches) == 3
        x, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    assert apart(weights(outcome), model.state_dict()) < 2e-6


def test_accumulation_does_not_change_what_is_learned(text, tmp_path):
    whole = train(text, tmp_path / "whole", batch_size=4)
    parts = train(text, tmp_path / "parts", batch_size=1, accumulation=4)
    assert parts.state.tokens == whole.state.tokens == 4 * 4 * 16
    assert apart(weights(whole), weights(parts)) < 2e-6


def test_two_processes_learn_what_one_does_with_two_batches(text, tmp_path):
    """And end well, though what follows the command's end, here an abort, may fail."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\nif 'RANK' in os.environ: atexit.register(os.abort)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    one = train(text, tmp_path / "one", batch_size=2, accumulation=2, evaluate_every=2)
    options = {"dim": 16, "depth": 2, "heads": 2, "dim-head": 8, "seq-len": 16, "evaluation-windows": 4, "steps": 4}
    options |= {"data": text, "sample-every": 0, "warmup-steps": 2, "batch-size": 2, "evaluate-every": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "memory_efficient_attention_pytorch", "train", "--out", "two", "--device", "cpu"]
    result = subprocess.run(
        command + [f"--{name}={value}" for name, value in options.items()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done: 4 steps") == 1
    two = load_file(tmp_path / "two/checkpoints/step-00000004/model.safetensors")
    assert apart(weights(one), two) < 2e-6
    mine, theirs = (validations(folder) for folder in (tmp_path / "one", tmp_path / "two"))
    assert [step for step, _ in mine] == [step for step, _ in theirs] == [0, 2, 4]
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], abs=1e-5)


@pytest.mark.slow
def test_a_sharded_model_learns_what_a_whole_one_does_and_goes_on_in_one_process(text, tmp_path):
    """Three windows of validation in batches of one: the second process has fewer, and takes part all the same."""
    last = {"steps": 6, "final_learning_rate": 1.0}
    train(text, tmp_path / "one", batch_size=2, accumulation=2, evaluate_every=2, evaluation_windows=3, **last)
    options = {"dim": 16, "depth": 2, "heads": 2, "dim-head": 8, "seq-len": 16, "evaluation-windows": 3, "steps": 4}
    options |= {"data": text, "sample-every": 2, "sample-tokens": 4, "warmup-steps": 2, "batch-size": 2}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "memory_efficient_attention_pytorch", "train"]
    options["final-learning-rate"] = 1.0
    two, sixth = tmp_path / "two", tmp_path / "one/checkpoints/step-00000006/model.safetensors"

    def run(*arguments):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    given = [f"--{name}={value}" for name, value in options.items()]
    run("--out=two", "--device=cpu", "--shard", "--evaluate-every=2", *given)
    shutil.copytree(two, tmp_path / "alone")
    run("--resume=two", "--steps=6")
    resume_run(tmp_path / "alone", {"steps": 6, "batch_size": 4, "shard": False}, lambda main: Callback())
    for folder in (two, tmp_path / "alone"):
        assert apart(load_file(sixth), weights_of(folder, 6)) < 2e-6
        assert [step for step, _ in validations(folder)] == [0, 2, 4, 6]
    assert load_run(two, checkpoint="last").config.shard
    with pytest.raises(ValueError, match="start several with torchrun"):
        train(text, tmp_path / "refused", shard=True)
    assert not (tmp_path / "refused").exists()


def weights_of(folder, step):
    found = load_run(folder, checkpoint="last")
    assert RunDirectory(folder).checkpoints.find("last").state.step == step
    return found.model.state_dict()


def validations(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]


def test_stored_and_rebuilt_activations_learn_alike(text, tmp_path):
    rebuilt = train(text, tmp_path / "rebuilt", batch_size=2, reversible=True)
    stored = train(text, tmp_path / "stored", batch_size=2, reversible=False)
    assert apart(weights(rebuilt), weights(stored)) < 1e-5


def test_a_run_that_goes_on_computes_as_it_began_whatever_is_free(text, tmp_path, monkeypatch):
    options = {"batch_size": 2, "dropout": 0.1, "checkpoint_every": 2}
    whole = train(text, tmp_path / "whole", steps=4, **options)
    assert whole.config.reversible is False
    begun = train(text, tmp_path / "begun", steps=4, **options)
    shutil.rmtree(begun.run.checkpoints.root / "step-00000004")
    monkeypatch.setattr("memory_efficient_attention_pytorch.training.budget.available_memory", lambda device: 1)
    resumed = resume_run(begun.run.path, {}, lambda main: Callback())
    assert resumed.config == begun.config
    assert apart(weights(whole), weights(resumed)) == 0
    scarce = train(text, tmp_path / "scarce", steps=1, **options)
    assert (scarce.config.reversible, scarce.config.keep_attention) == (True, False)


def test_validations_and_samples_do_not_change_what_is_learned(text, tmp_path):
    often = train(
        text, tmp_path / "often", batch_size=2, dropout=0.2, evaluate_every=1, sample_every=1, sample_tokens=4
    )
    seldom = train(text, tmp_path / "seldom", batch_size=2, dropout=0.2, evaluate_every=100)
    assert apart(weights(often), weights(seldom)) == 0


def test_another_seed_learns_something_else(text, tmp_path):
    one, other = (train(text, tmp_path / str(seed), batch_size=2, seed=seed) for seed in (0, 1))
    assert apart(weights(one), weights(other)) > 1e-3


def test_the_batches_divided_otherwise_go_on_the_same(text, tmp_path):
    """Eight processes become four: the same windows a step in another division."""
    whole = train(text, tmp_path / "whole", batch_size=4, steps=6, warmup_steps=0, final_learning_rate=1.0)
    train(text, tmp_path / "half", batch_size=4, steps=3, warmup_steps=0, final_learning_rate=1.0)
    changes = {"steps": 6, "batch_size": 2, "accumulation": 2}
    resumed = resume_run(tmp_path / "half", changes, lambda main: Callback())
    assert apart(weights(whole), weights(resumed)) < 2e-6


def test_a_finished_run_loads_with_its_tokenizer(text, tmp_path):
    outcome = train(text, tmp_path / "run", batch_size=2, vocab_size=300, evaluate_every=1, steps=6)
    model, tokenizer, config = load_run(tmp_path / "run", checkpoint="last")
    assert config == outcome.config
    assert tokenizer.decode(tokenizer.encode("line 7 of a text")) == "line 7 of a text"
    assert not model.training
    assert apart(weights(outcome), model.state_dict()) == 0

    best = load_run(tmp_path / "run").model
    corpus = Corpus(outcome.run.data)
    x = torch.from_numpy(corpus.validation[: config.seq_len + 1].astype("int64"))[None]
    with torch.no_grad():
        losses = {name: m(x[:, :-1], labels=x[:, 1:]).item() for name, m in (("best", best), ("last", model))}
    assert all(math.isfinite(loss) for loss in losses.values())
    with pytest.raises(ValueError, match="is not a run directory"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="there is no run directory"):
        load_run(tmp_path / "nowhere")


def test_a_run_without_a_sound_checkpoint_cannot_be_loaded(text, tmp_path):
    outcome = train(text, tmp_path / "run", batch_size=2)
    outcome.run.checkpoints.find().files("model")[0].write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="holds no intact checkpoint"):
            load_run(tmp_path / "run")


def test_mixed_precision_rebuilds_exactly_by_itself(text, tmp_path):
    exact = train(text, tmp_path / "exact", batch_size=2, precision="bf16", reversible=True)
    assert exact.config.exact
    stored = train(text, tmp_path / "stored", batch_size=2, precision="bf16", reversible=False)
    assert stored.config.exact is False


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 89)))
    assert rates[99] == pytest.approx(0.1)
    assert learning_rate(TrainConfig(steps=1, warmup_steps=0), 0) > 0


def test_every_parameter_is_optimised_once_and_only_matrices_decay():
    model = build_model(TrainConfig(**TINY), 256)
    decayed, rest = adamw(model.parameters(), TrainConfig(weight_decay=0.3)).param_groups
    assert {id(p) for p in decayed["params"] + rest["params"]} == {id(p) for p in model.parameters()}
    assert len(decayed["params"] + rest["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])


def test_what_a_callback_raises_ends_the_run_and_leaves_it_resumable(text, tmp_path):
    class Failing(Callback):
        def log(self, record):
            if isinstance(record, Step) and record.step == 3:
                raise KeyError("a bug in a display")

    with pytest.raises(KeyError):
        train(text, tmp_path / "run", Failing(), batch_size=2, checkpoint_every=1)
    resumed = resume_run(tmp_path / "run", {}, lambda main: Callback())
    assert apart(weights(resumed), weights(train(text, tmp_path / "whole", batch_size=2))) == 0


def test_what_was_validated_before_the_first_step_is_not_validated_again(text, tmp_path):
    class Closed(Callback):
        def log(self, record):
            if isinstance(record, Validation):
                raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        train(text, tmp_path / "run", Closed(), batch_size=2)
    resumed = resume_run(tmp_path / "run", {}, lambda main: Callback())
    steps = [record["step"] for record in read_metrics(resumed.run.metrics) if "validation_loss" in record]
    assert steps == [0, 4]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reversible": False}, "off, activations are stored"),
        ({"reversible": True}, "on, not exact, since fp32 rounds little"),
        ({"reversible": True, "exact": True}, "exact"),
        ({"reversible": True, "precision": "bf16"}, "exact, since bf16 would round"),
        ({"reversible": True, "precision": "bf16", "exact": False}, "on, not exact"),
    ],
    ids=str,
)
def test_the_reason_for_exact_reversal_is_given_where_it_is_the_reason(options, said, text, tmp_path):
    class Told(Callback):
        def started(self, plan, *rest):
            lines.extend(plan.splitlines())

    lines: list[str] = []
    train(text, tmp_path / "run", Told(), batch_size=2, steps=1, **options)
    assert f"  reversal: {said}" in lines
