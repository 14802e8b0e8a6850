"""A deep model's step, put together from those of two shallow ones, is the deep model's own in every operation."""

import numpy as np
import pytest
import torch

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.planner.accounting import Accounting, accounting_for
from memory_efficient_attention_pytorch.planner.step import dry_run
from memory_efficient_attention_pytorch.planner.timeline import CATEGORIES, Operation, Timeline, at_depth
from memory_efficient_attention_pytorch.planner.workload import Workload, shortened

BASE = {"num_tokens": 64, "dim": 32, "depth": 7, "heads": 4, "dim_head": 8, "causal": True, "ff_chunks": 4}


def timelines(config, depths, device="cpu", **options):
    """Those of some depths, each run as it is."""
    accounting = accounting_for(torch.device(device), threads=2)
    found = []
    for depth in depths:
        workload = Workload({**config, "depth": depth}, batch_size=1, seq_len=200, **options)
        tokens = torch.zeros(1, 200 // workload.context, dtype=torch.long, device="meta")
        step = workload.step(workload.transformer(depth), (tokens,), {"labels": tokens})
        found.append(dry_run(step, accounting))
    return found


@pytest.mark.parametrize(
    ("changes", "device", "options"),
    [
        ({}, "cpu", {}),
        ({"reversible": False}, "cpu", {"optimizer": "sgd"}),
        ({"head_chunks": 2, "exact": True}, "cuda", {"autocast": torch.bfloat16}),
        ({"head_chunks": 4, "keep_attention": True}, "cpu", {}),
        ({"head_chunks": 2, "keep_attention": True, "exact": True}, "cuda", {"autocast": torch.bfloat16}),
        ({"keep_attention": "cpu", "dropout": 0.1}, "cuda", {}),
        ({"num_tokens": 9000, "tie_embeddings": True}, "cuda", {"optimizer": None}),
        ({"dropout": 0.1, "positions": "rotary", "kv_heads": 2}, "cpu", {"dtype": torch.bfloat16}),
        ({}, "cpu", {"shards": 4}),
        ({"head_chunks": 2, "window": 9}, "cpu", {"context": 2}),
        ({"kv_heads": 1, "exact": True}, "cuda", {"context": 4, "shards": 4, "keep_gradients": False}),
    ],
    ids=str,
)
def test_depth_is_put_together_exactly(changes, device, options):
    few = 3 if "shards" in options else 2
    shallow, deeper, deep = timelines({**BASE, **changes}, (few, few + 1, BASE["depth"]), device, **options)
    made = at_depth(shallow, deeper, BASE["depth"] - few)
    assert made.operations == deep.operations
    np.testing.assert_array_equal(made.live, deep.live)
    assert made.flops == pytest.approx(deep.flops, rel=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4, 6])
def test_every_block_keeps_its_attention(depth):
    def peak(**settings):
        workload = Workload({**BASE, "depth": depth, **settings}, batch_size=1, seq_len=2000, optimizer=None)
        return workload.run_dry(Accounting(torch.device("cpu"))).totals.max()

    # Of each token the heads' outputs and their log-sum-exps. The peak is the backward of the last block, where
    # without it the forward pass's output stands for that of this block.
    kept = 2000 * 4 * (8 + 1) * 4
    added = peak(keep_attention=True) - peak()
    assert (depth - 1) * kept <= added <= depth * kept


def test_a_built_model_is_planned_as_its_configuration_is():
    accounting = accounting_for(torch.device("cpu"), threads=2)
    with torch.device("meta"):
        model = Transformer(max_seq_len=64, **BASE)
    by_model, by_config = (Workload(subject, batch_size=2, seq_len=64).run_dry(accounting) for subject in (model, BASE))
    np.testing.assert_array_equal(by_model.live, by_config.live)
    assert len(model.layers) == BASE["depth"]
    assert len(shortened(model, 2).layers) == 2


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_hook_of_one_block_is_run_once_wherever_it_is(at):
    def squashed(module, args, output):
        return tuple(torch.sigmoid(part) for part in output)

    with torch.device("meta"):
        model = Transformer(max_seq_len=64, reversible=False, **BASE)
    accounting = accounting_for(torch.device("cpu"), threads=2)
    model.layers[at].register_forward_hook(squashed)

    def seen():
        made = Workload(model, batch_size=1, seq_len=64).run_dry(accounting)
        return sum("aten.sigmoid.default" in operation.name for operation in made.operations)

    assert seen() == 2
    for number, layer in enumerate(model.layers):
        if number != at:
            layer.register_forward_hook(squashed)
    assert seen() == 2 * BASE["depth"]


@pytest.mark.slow
def test_blocks_that_differ_are_all_run():
    accounting = accounting_for(torch.device("cpu"), threads=2)
    with torch.device("meta"):
        model = Transformer(max_seq_len=512, ff_mult=16, **BASE)
    alike = Workload(model, batch_size=2, seq_len=512).run_dry(accounting)
    model.layers[4].g.fn.chunks = 1
    different = Workload(model, batch_size=2, seq_len=512).run_dry(accounting)
    assert len(different.operations) < len(alike.operations)
    assert different.totals.max() > alike.totals.max()


def test_operations_that_do_not_line_up_are_refused():
    def made_of(*names):
        operations = [Operation("forward", "", name) for name in names]
        return Timeline(operations, np.zeros((len(names), len(CATEGORIES)), dtype=np.int64), 0.0)

    with pytest.raises(ValueError, match="blocks are not alike"):
        at_depth(made_of("a", "b", "c"), made_of("a", "x", "c", "d"), 3)
