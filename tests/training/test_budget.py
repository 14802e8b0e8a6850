"""`mea train --memory-budget`, the real command in a process of its own."""

import argparse
import dataclasses
import functools
import re

import pytest
import torch
from accelerate import Accelerator

from memory_efficient_attention_pytorch.cli.train import add_arguments
from memory_efficient_attention_pytorch.common.sizes import format_size
from memory_efficient_attention_pytorch.training import budget
from memory_efficient_attention_pytorch.training.config import TrainConfig, dump_config, load_config
from memory_efficient_attention_pytorch.training.model import build_model
from tests.cli import train_command

SHAPE = ["--dim=64", "--depth=8", "--heads=4", "--dim-head=16", "--seq-len=1024", "--batch-size=4", "--device=cpu"]
SHORT = ["--data", "text.txt", "--steps=2", "--evaluation-windows=2", "--sample-every=0"]
MIB = 2**20
SETTINGS = ("reversible", "exact", "keep_attention", "head_chunks", "ff_chunks", "loss_chunk_size")


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "text.txt").write_text("".join(f"line {i} of a text to learn\n" for i in range(4000)))
    return folder


@pytest.fixture
def train(here):
    """Runs `mea train` on the text with a budget."""
    return functools.partial(train_command.mea, here, "train", *SHORT, *SHAPE, "--memory-budget")


def sizes(line):
    """The sizes in a line, in bytes."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) ([KMG]iB)", line)]


def memory_lines(result):
    """The one line at the start and the one at the end."""
    assert result.status == 0, result.error
    start, end = (line for line in result.out.splitlines() if line.startswith("memory: "))
    return start, end


def leanest(refused):
    """What the leanest settings of a refused run take, in bytes."""
    assert refused.status == 2, refused.out
    return sizes(refused.error)[0]


def test_settings_are_chosen_saved_and_kept(train, here):
    """Everything fits in much; in less the run is reversible, as predicted, and stays so when it goes on."""
    start, end = memory_lines(train("8GiB"))
    predicted, allowed, before, *_ = sizes(start)
    assert "chosen: store everything, the fastest way there is (reversible off, " in start
    assert allowed == 8 * 2**30
    measured = sizes(end)[0]
    assert abs(measured - predicted) < 0.05 * (measured - before) + 12 * MIB
    assert "within the 8 GiB allowed" in end
    assert load_config(here / "runs/1/config.toml").reversible is False

    budget = before + (predicted - before) / 3
    start, end = memory_lines(train(f"{budget:.0f}"))
    leaner, allowed, *_ = sizes(start)
    assert leaner <= allowed == pytest.approx(budget, rel=0.01)
    assert "chosen: reversible with attention kept, since the next faster way, feed-forward in 8 chunks, takes" in start
    assert "keep_attention on, " in start
    assert sizes(end)[0] < measured - (predicted - before) / 2
    saved = load_config(here / "runs/2/config.toml")
    assert saved.memory_budget == f"{budget:.0f}"
    assert saved.reversible is True
    assert saved.keep_attention is True
    assert saved.ff_chunks == 8

    resumed = train_command.mea(here, "train", "--resume", "runs/2", "--steps=3")
    assert "every setting was given before" in memory_lines(resumed)[0]
    after = load_config(here / "runs/2/config.toml")
    assert [getattr(after, name) for name in SETTINGS] == [getattr(saved, name) for name in SETTINGS]


@pytest.mark.slow
def test_without_a_budget_the_fastest_settings_that_fit_in_what_is_free():
    free = {"bytes": 16 << 30}
    shape = TrainConfig(dim=64, depth=8, heads=4, dim_head=16, seq_len=1024, batch_size=4)

    def fitted(config=shape, **more):
        return budget.fastest_that_fits(config, torch.device("cpu"), 256, free=free["bytes"], **more)

    plenty, words = fitted()
    stored, allowed, leanest = sizes(words)
    assert (plenty.reversible, plenty.exact, plenty.keep_attention) == (False, False, False)
    assert allowed == 16 << 30
    assert "the fastest settings that fit in the 16 GiB free (store everything; the leanest would take " in words

    free["bytes"] = int(stored)
    scarce, words = fitted()
    taken, _, least = sizes(words)
    assert scarce.reversible is False or scarce.keep_attention
    assert least == leanest < taken < stored * 7 / 8
    free["bytes"] = int(leanest * 1.3)
    assert fitted()[0].reversible is True
    # Two processes on a CPU share it, and each sends its gradients in buckets.
    assert "it may run out" in fitted(processes=2)[1]
    free["bytes"] = 1 << 20
    short, words = fitted()
    assert (short.reversible, short.keep_attention, short.head_chunks) == (True, False, 4)
    assert words.startswith(f"the leanest settings take {format_size(leanest)} where 1 MiB is free")

    # What was given stays, and is measured no more where nothing is open.
    given = fitted(dataclasses.replace(shape, reversible=True, keep_attention=True))[0]
    assert (given.reversible, given.keep_attention) == (True, True)
    settled = plenty.updated({"loss_chunk_size": 512})
    assert fitted(settled) == (settled, "")


def test_where_a_device_does_not_tell_what_is_free_activations_are_rebuilt_and_a_budget_is_asked_for(monkeypatch):
    def unknown(device):
        raise NotImplementedError

    monkeypatch.setattr(budget, "available_memory", unknown)
    free = budget.least_free(Accelerator(cpu=True))
    config, words = budget.fastest_that_fits(TrainConfig(), torch.device("cpu"), 256, free=free)
    assert config.reversible is True
    assert "is not known" in words
    asked = dataclasses.replace(WIDE, memory_budget="auto")
    with pytest.raises(ValueError, match="memory_budget: expected a size, since how much is free on cpu is not known"):
        budget.within_budget(asked, torch.device("cpu"), 256, free=free)


@pytest.fixture
def alone(monkeypatch):
    """Decides within a budget on a device where nothing else takes memory; returns what `mea train` would."""
    monkeypatch.setattr(budget, "memory_now", lambda device: 0)
    monkeypatch.setattr(budget, "memory_peak", lambda device: 0)

    def decide(config, bytes_, processes, **more):
        config = dataclasses.replace(config, memory_budget=str(bytes_))
        return budget.within_budget(config, torch.device("cpu"), 256, processes=processes, **more)

    return decide


WIDE = TrainConfig(
    **{"dim": 256, "depth": 2, "heads": 4, "dim_head": 64, "seq_len": 64, "batch_size": 1, "reversible": True},
    **{"head_chunks": 1, "ff_chunks": 1, "keep_attention": False, "loss_chunk_size": 32, "precision": "fp32"},
)
LONG = dataclasses.replace(WIDE, dim=32, dim_head=8, seq_len=8192, batch_size=4)
NOISE = 8 * MIB  # by which processes differ


def peak(alone, config, processes, **division):
    """What a process takes at its peak where the work is divided like this."""
    return alone(dataclasses.replace(config, **division), 1 << 40, processes)[1].predicted


def test_processes_share_the_model_and_then_the_tokens_where_nothing_fits_otherwise(alone):
    whole = peak(alone, LONG, 4, shard=False, context_parallel=1)
    chosen, memory = alone(LONG, whole + NOISE, 4)
    assert (chosen.shard, chosen.context_parallel, chosen.accumulation) == (False, 1, 1)
    assert "divided" not in memory.choice
    half = peak(alone, LONG, 4, shard=False, context_parallel=2, accumulation=2)
    assert half < 0.8 * whole

    chosen, memory = alone(LONG, half + NOISE, 4)
    assert (chosen.shard, chosen.context_parallel) == (False, 2)
    assert chosen.accumulation == 2, "a step has as many windows as before"
    assert memory.predicted == half
    words = "; divided among the processes, since nothing fits otherwise (context_parallel 2, accumulation 2)"
    assert words in memory.choice

    # A run that goes on keeps what it has, and may take all that is allowed.
    again, _ = alone(chosen, half, 4, settled=True)
    assert again == dataclasses.replace(chosen, memory_budget=again.memory_budget)
    # One process is told how many would do.
    config = dataclasses.replace(LONG, shard=False)
    with pytest.raises(ValueError, match="or 2 processes with --context-parallel 2 --accumulation 2 would fit"):
        alone(config, half + NOISE, 1)


def test_a_model_is_sharded_before_its_tokens_are_divided(alone):
    whole, sharded = (peak(alone, WIDE, 2, shard=shard, context_parallel=1) for shard in (False, True))
    assert sharded < 0.8 * whole
    chosen, memory = alone(WIDE, sharded + NOISE, 2)
    assert (chosen.shard, chosen.context_parallel, chosen.accumulation) == (True, 1, 1)
    assert memory.choice.endswith("since nothing fits otherwise (shard on)")
    with pytest.raises(ValueError, match="the leanest settings take"):  # what was given stays
        alone(dataclasses.replace(WIDE, shard=False, context_parallel=1), sharded + NOISE, 2)


def test_what_is_free_on_a_cpu_is_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(budget, "memory_now", lambda device: 0)
    config = dataclasses.replace(WIDE, memory_budget="auto")
    chosen, _ = budget.within_budget(config, torch.device("cpu"), 256, processes=4, free=8 << 30)
    assert chosen.memory_budget == "2048MiB"


@pytest.mark.parametrize(("length", "advised"), [(1, []), (2, ["2"])])
def test_what_a_run_could_not_have_is_not_advised(alone, monkeypatch, length, advised):
    """A plan may be of one token; a run has at least two."""
    planned = budget.plan

    def with_remedies(*arguments, **options):
        made = planned(*arguments, **options)
        asked = made.budget is not None and not made.fits()
        return dataclasses.replace(made, remedies={**made.remedies, "seq_len": length}) if asked else made

    monkeypatch.setattr(budget, "plan", with_remedies)
    config = dataclasses.replace(WIDE, shard=False, context_parallel=1, seq_len=3)  # so that little is looked for
    with pytest.raises(ValueError, match=r", and 8 MiB more must stay free: .* would fit$") as refused:
        alone(config, 24 * MIB, 1)
    assert re.findall(r"--seq-len (\d+)", str(refused.value)) == advised


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_what_would(train, here):
    shape = ("--batch-size=16", "--seq-len=2048", "--depth=2", "--heads=2")
    budget = f"{leanest(train('16MiB', *shape)) / MIB - 14:.0f}MiB"
    result = train(budget, *shape)
    assert result.status == 2
    assert result.out == ""
    assert result.error.startswith("mea train: memory_budget: the leanest settings take ")
    assert result.error.count("\n") == 1
    assert not (here / "runs").exists()
    length, batch, enough = re.search(
        r"--batch-size (\d+) or --seq-len (\d+) or --memory-budget (\d+MiB)\b.* would fit", result.error
    ).group(2, 1, 3)
    assert 128 < int(length) < 2048
    assert 1 < int(batch) < 16
    for changes in ([budget, *shape, "--seq-len", length], [budget, *shape, "--batch-size", batch], [enough, *shape]):
        memory_lines(train(*changes, "--steps=1"))


@pytest.mark.slow
def test_what_the_user_gave_is_not_overridden(train, here):
    start, _ = memory_lines(train("8GiB", "--reversible", "--keep-attention=cpu", "--head-chunks=4", "--steps=1"))
    assert "chosen: reversible, in one piece" in start
    config = load_config(here / "runs/1/config.toml")
    assert config.reversible is True
    assert config.keep_attention == "cpu"
    assert config.head_chunks == 4
    long = ("--depth=3", "--seq-len=4096")
    stored, rebuilt = (leanest(train("16MiB", *long, *given)) for given in (["--no-reversible"], []))
    assert stored > rebuilt + 8 * MIB


def test_the_budget_may_stand_in_the_configuration_file(here):
    (here / "run.toml").write_text('memory_budget = "auto"\nprecision = "bf16"\naccumulation = 2\n')
    start, _ = memory_lines(train_command.mea(here, "train", "--config", "run.toml", *SHORT, *SHAPE))
    saved = load_config(here / "runs/1/config.toml")
    assert int(saved.memory_budget.removesuffix("MiB")) == pytest.approx(sizes(start)[1] / MIB, rel=0.01)
    assert "chosen: store everything" in start


@pytest.mark.parametrize(
    ("arguments", "written", "value"),
    [
        ([], "# keep_attention =", None),
        (["--keep-attention"], "keep_attention = true", True),
        (["--no-keep-attention"], "keep_attention = false", False),
        (["--keep-attention", "cpu"], 'keep_attention = "cpu"', "cpu"),
    ],
    ids=str,
)
def test_keeping_attention_is_a_switch_with_a_place(tmp_path, arguments, written, value):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = TrainConfig(keep_attention=getattr(parser.parse_args(arguments), "keep_attention", None))
    assert f"\n{written}  #" in dump_config(config)
    (tmp_path / "run.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.toml").keep_attention == value
    layer = build_model(dataclasses.replace(config, dim=8, depth=1, heads=1), 4).layers[0].f.fn
    assert layer.keep_attention == (value or False)


def test_keeping_attention_elsewhere_is_refused(capsys):
    with pytest.raises(ValueError, match="keep_attention must be true or false or \"cpu\", got 'gpu'"):
        TrainConfig(keep_attention="gpu")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for arguments in (["--keep-attention", "gpu"], ["--no-keep-attention", "cpu"], ["--reversible", "cpu"]):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
    assert "takes no value" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["8XB", "0", "lots", "-3GiB", ""])
def test_nonsense_is_refused_in_one_line(train, here, size):
    result = train_command.mea(here, "train", *SHORT, f"--memory-budget={size}")
    assert result.status == 2
    expected = f"memory_budget: expected a size above zero such as 8GB, 8GiB or 8000M, got {size!r}"
    assert result.error == f"mea train: {expected}\n"
    assert not (here / "runs").exists()
