"""A step of one of several processes, of which none is there."""

import pytest
import torch
import torch.distributed as dist

from memory_efficient_attention_pytorch import Transformer, max_seq_len, plan
from memory_efficient_attention_pytorch.distributed.all_to_all import AllToAll
from memory_efficient_attention_pytorch.planner.accounting import accounting_for
from memory_efficient_attention_pytorch.planner.step import dry_run
from memory_efficient_attention_pytorch.planner.timeline import CATEGORIES
from memory_efficient_attention_pytorch.planner.workload import Workload
from tests.benchmarking.scripts import FOLDER, load_benchmark

CONFIG = {"num_tokens": 256, "dim": 64, "depth": 4, "heads": 4, "dim_head": 16, "causal": True, "positions": "none"}
STEP = {"batch_size": 1, "seq_len": 4096, "device": "cpu", "threads": 1}


def parameter_bytes(depth=CONFIG["depth"]):
    return 4 * sum(
        parameter.numel() for parameter in Transformer(max_seq_len=1, **{**CONFIG, "depth": depth}).parameters()
    )


def test_what_is_sharded_is_divided_and_two_blocks_are_gathered():
    made = plan(CONFIG, shards=4, **STEP)
    at_first, whole = made.timeline.breakdown(0), parameter_bytes()
    assert at_first["parameters"] == at_first["gradients"] == whole // 4
    assert at_first["optimizer"] == pytest.approx(2 * whole // 4, abs=1000)
    communication = made.timeline.live[:, CATEGORIES.index("communication")]
    block = parameter_bytes(2) - parameter_bytes(1)
    rest = parameter_bytes(1) - block
    # In backward: this block's parameters, those for the one before, the gradients of the one after, and the rest.
    assert int(communication.max()) >= 3 * block + rest
    assert int(communication.max()) <= 4 * block + 2 * rest


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 4], ids=["ring", "heads for tokens"])
def test_activations_of_divided_tokens_are_divided(kv_heads):
    """All stored, which is most of what a step takes, as it is measured of real processes."""

    def activations(**changes):
        stored = {**CONFIG, "reversible": False, "kv_heads": kv_heads, "ff_chunks": 1}
        made = plan(stored, optimizer=None, **{**STEP, "seq_len": 16384, **changes})
        at_peak = made.breakdown
        return sum(at_peak[name] for name in ("streams", "attention", "feed-forward", "loss", "communication"))

    alone = activations()
    assert 2 * activations(context=2) < 1.1 * alone
    assert 4 * activations(context=4) < 1.1 * alone


def test_every_way_of_going_round_is_the_real_one():
    """One key/value head goes round a ring; as many as heads are exchanged for tokens."""
    assert way_of(plan({**CONFIG, "kv_heads": 1}, context=4, **STEP)) == "ring"
    assert way_of(plan(CONFIG, context=4, **STEP)) == "all_to_all"


def way_of(made):
    names = {operation.name for operation in made.timeline.operations}
    ways = {"ring": "c10d._send_and_receive", "all_to_all": "c10d.all_to_all_single"}
    (taken,) = [way for way, name in ways.items() if name in names]
    return taken


@pytest.mark.parametrize(
    ("seq_len", "changes", "way"),
    [(2048, {}, "all_to_all"), (16384, {}, "ring"), (16384, {"reversible": False}, "all_to_all")],
    ids=["few tokens", "many, four heads at a time", "many, stored"],
)
def test_heads_are_exchanged_where_that_takes_little_memory(seq_len, changes, way, monkeypatch):
    """Four threads have a head each: an exchange would add all tokens of one to a quarter of the tokens of four."""
    config = {**CONFIG, "dim": 512, "heads": 8, "dim_head": 64, "depth": 2, **changes}
    options = {**STEP, "seq_len": seq_len, "threads": 4, "optimizer": None, "context": 4}
    made = plan(config, **options)
    assert way_of(made) == way
    monkeypatch.setattr(AllToAll, "adds_little", lambda *_: True)
    exchanged = plan(config, **options)
    assert way_of(exchanged) == "all_to_all"
    assert (exchanged.peak_bytes - made.peak_bytes > 12 * 2**20) == (way == "ring")


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_heads": 1},
        {"kv_heads": 1, "window": 700},
        pytest.param({"kv_heads": 1, "causal": False}, marks=pytest.mark.slow),
        {
            "dim": 32,
            "heads": 8,
            "dim_head": 64,
            "head_chunks": 1,
            "ff_chunks": 64,
        },  # the peak is in the middle of a turn
    ],
    ids=str,
)
def test_a_few_turns_of_the_ring_stand_for_all(changes, monkeypatch):
    monkeypatch.setattr(AllToAll, "refusal", staticmethod(lambda *_: "not here"))
    workload = Workload({**CONFIG, **changes}, 1, 32768, context=16)
    tokens = torch.zeros(1, 2048, dtype=torch.long, device="meta")
    step = workload.step(workload.transformer(1), (tokens,), {"labels": tokens})
    few, all_ = (dry_run(step, accounting_for(torch.device("cpu"), 1), every_part=every) for every in (False, True))
    assert few.totals.max() == all_.totals.max()
    assert few.flops == pytest.approx(all_.flops, rel=0.02)
    if "window" not in changes:
        assert len(few.operations) < len(all_.operations) / 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 8], ids=["shards", "tokens"])
def test_two_real_processes_take_what_is_planned(number, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = load_benchmark("planner_processes")
    row = benchmark.compare(benchmark.PROCESSES[number])
    assert abs(row.error) <= 0.05, row


def test_a_plan_for_several_processes_starts_none():
    plan(CONFIG, shards=2, context=2, **STEP)
    assert not dist.is_initialized()


@pytest.mark.slow
def test_more_processes_hold_longer_sequences():
    options = {"budget": "30MiB", "device": "cpu", "threads": 1}
    assert max_seq_len(CONFIG, context=4, shards=4, **options) > 2 * max_seq_len(CONFIG, **options)


@pytest.mark.parametrize("name", ["shards", "context"])
def test_what_only_training_steps_of_a_transformer_have(name):
    with pytest.raises(ValueError, match=f"{name}: expected 1 for all but a Transformer's training step, got 2"):
        plan(CONFIG, training=False, **STEP, **{name: 2})
    with pytest.raises(ValueError, match=f"{name}: expected a positive"):
        plan(CONFIG, **STEP, **{name: 0})
