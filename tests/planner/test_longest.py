"""``max_seq_len``: the longest sequence that fits."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.planner import max_seq_len, plan

CONFIG = {"num_tokens": 256, "dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "causal": True}


def test_the_longest_sequence_fits_and_a_longer_one_does_not():
    budget = 200 * 2**20
    longest = max_seq_len(CONFIG, budget=budget, device="cpu", threads=2)
    assert plan(CONFIG, batch_size=1, seq_len=longest, device="cpu", threads=2).fits(budget)
    assert longest % 64 == 0, "as from 4096 tokens on"
    longer = plan(CONFIG, batch_size=1, seq_len=longest + longest // 30, device="cpu", threads=2)
    assert not longer.fits(budget)


@pytest.mark.slow
def test_learned_positions_bound_the_longest_sequence():
    assert max_seq_len({**CONFIG, "max_seq_len": 100}, budget="8GiB", device="cpu") == 100
    relative = {**CONFIG, "max_seq_len": 100, "positions": "rotary"}
    assert max_seq_len(relative, budget="64MiB", device="cpu") > 1000
    with torch.device("meta"):
        assert max_seq_len(Transformer(max_seq_len=100, **CONFIG), budget="8GiB", device="cpu") == 100


def test_the_longest_sequence_of_any_module():
    longest = max_seq_len(
        nn.Linear(64, 64),
        budget=2**20,
        device="cuda",
        optimizer=None,
        example_inputs=lambda batch, length: torch.zeros(batch, length, 64, device="meta"),
        loss_fn=torch.sum,
    )
    assert longest == 0, "the workspace of the matrix products alone takes more"


def test_the_longest_sequence_of_inputs_that_have_one_length():
    with pytest.raises(ValueError, match=r"example_inputs: expected a function of .*, got Tensor"):
        max_seq_len(nn.Linear(2, 2), budget="1GiB", example_inputs=torch.zeros(1, 2))


@pytest.mark.parametrize("built", [False, True])
def test_the_token_after_a_prompt_has_a_learned_position_too(built):
    subject = {**CONFIG, "max_seq_len": 100}
    with torch.device("meta"):
        subject = Transformer(**subject) if built else subject
    assert max_seq_len(subject, budget="8GiB", device="cpu", training=False) == 99


def test_inputs_that_do_not_grow_are_refused_instead_of_growing_for_ever():
    with pytest.raises(ValueError, match="example_inputs: expected inputs that grow with seq_len"):
        max_seq_len(
            nn.Linear(8, 8),
            budget="1GiB",
            device="cpu",
            optimizer=None,
            loss_fn=torch.sum,
            example_inputs=lambda batch, length: torch.zeros(batch, 3, 8, device="meta"),
        )
