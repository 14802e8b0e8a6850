"""What generation draws from given logits."""

import math

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import AutoregressiveWrapper


class Fixed(nn.Module):
    """Always the same logits, after any token."""

    max_seq_len = 8

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.as_tensor(logits)

    def forward(self, x):
        return self.logits.expand(*x.shape, -1)


def drawn(logits, rows=4000, **options):
    """Share of each token in so many draws."""
    start = torch.zeros(rows, 1, dtype=torch.long)
    options = {"filter_thres": 0.0, **options}
    tokens = AutoregressiveWrapper(Fixed(logits)).generate(start, 1, **options)
    return torch.bincount(tokens.flatten(), minlength=len(logits)) / rows


@pytest.mark.parametrize(
    ("num_tokens", "filter_thres", "kept"),
    [(1, 0.9, 1), (5, 0.9, 1), (10, 0.9, 1), (11, 0.9, 2), (256, 0.9, 26), (10, 0.7, 3), (10, 1.0, 1), (10, 0.0, 10)],
)
def test_filter_keeps_the_ceiling_and_at_least_one(num_tokens, filter_thres, kept):
    logits = torch.linspace(0, 0.1, num_tokens)[torch.randperm(num_tokens)]
    shares = drawn(logits, filter_thres=filter_thres)
    assert set(shares.nonzero().flatten().tolist()) == set(logits.topk(kept).indices.tolist())


def test_the_default_filter_is_upstreams():
    shares = drawn(torch.linspace(0, 0.1, 40), filter_thres=0.9)
    torch.manual_seed(0)
    start = torch.zeros(4000, 1, dtype=torch.long)
    tokens = AutoregressiveWrapper(Fixed(torch.linspace(0, 0.1, 40))).generate(start, 1)
    assert set(tokens.flatten().tolist()) == set(shares.nonzero().flatten().tolist()) == {36, 37, 38, 39}


@pytest.mark.parametrize("top_k", [1, 3, 10, 1000])
def test_top_k_goes_before_the_filter(top_k):
    shares = drawn(torch.linspace(0, 1, 10), top_k=top_k, filter_thres=0.9)
    assert shares.count_nonzero() == min(top_k, 10)


def test_equal_logits_are_not_all_kept():
    assert drawn(torch.zeros(10), top_k=4).count_nonzero() == 4


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.81, {0, 1, 2}), (0.79, {0, 1}), (0.5, {0}), (0.01, {0})]
)
def test_top_p_keeps_the_least_set_that_reaches_it(top_p, kept):
    shares = drawn(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), top_p=top_p)
    assert set(shares.nonzero().flatten().tolist()) == kept


def test_top_p_counts_after_temperature_and_top_k():
    # At temperature 2 the shares of the first three are as √0.5 : √0.3 : √0.15 = 0.44 : 0.34 : 0.24.
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert drawn(logits, top_k=3, temperature=2.0, top_p=0.75).count_nonzero() == 2
    assert drawn(logits, top_k=3, temperature=2.0, top_p=0.8).count_nonzero() == 3


@pytest.mark.parametrize("options", [{}, {"temperature": 2.5}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.95}])
def test_frequencies_are_the_softmaxs(options):
    logits, rows = torch.tensor([0.3, -1.0, 2.0, 1.0, -0.5]), 40000
    p = (logits / options.get("temperature", 1.0)).softmax(-1)
    if "top_k" in options:
        p[p.argsort(descending=True)[options["top_k"] :]] = 0
    if "top_p" in options:
        p[1] = 0  # in order 0.59, 0.22, 0.11, 0.05, 0.03: the first three reach 0.92, four 0.97
    p /= p.sum()
    deviation = (p * (1 - p) / rows).sqrt()
    assert ((drawn(logits, rows, **options) - p).abs() <= 4.5 * deviation).all()


@pytest.mark.parametrize("temperature", [0.0, 0, 1e-30, 1e-310])
def test_no_temperature_takes_the_likeliest(temperature):
    assert drawn(torch.tensor([0.0, 1.0, 1.001, -math.inf]), temperature=temperature)[2] == 1


def test_a_token_that_is_ruled_out_is_never_drawn():
    assert drawn(torch.tensor([0.0, -math.inf, 0.0]), temperature=50.0)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_logits_of_any_dtype(dtype):
    shares = drawn(torch.tensor([0, 2, 1]).to(dtype), rows=20000)
    assert torch.allclose(shares, torch.tensor([0.0900, 0.6652, 0.2447]), atol=0.015)


@pytest.mark.parametrize("logits", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_mean_nothing_are_refused(logits, temperature):
    with pytest.raises(ValueError, match=r"net: expected finite logits, got \["):
        drawn(torch.tensor(logits), rows=1, temperature=temperature)
