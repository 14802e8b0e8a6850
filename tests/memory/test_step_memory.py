"""Live bytes of a whole training step, in units of one fp32 tensor of tokens x dim, held to figures.

Where they are, for g groups of heads, c chunks of the feed-forward and a hidden layer of m dims:

- kept between forward and backward: 3, the input of the last step and the gradient of the streams' sum (the loss makes
  it in passing);
- in attention's backward: 4 + 8 / g, the streams and their gradients; q, k, v, the output and a gradient of each;
- in the feed-forward's forward: 5 + (2 m + 1) / c, the embeddings, a block's two streams before and after it, the
  hidden values before and after the activation, and their input's norm.

The larger of the two is the peak but for what is small beside long sequences: slabs (512 tokens at the least, here a
quarter of all), the log-sum-exp, a chunk of logits. Gradients of weights are there and added to in place.
"""

from functools import cache

import pytest
import torch

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.benchmarking.measure import zero_grads
from tests.memory.live_bytes import LiveBytes

TOKENS, DIM = 2048, 64
MANY_PIECES = {"head_chunks": 8, "ff_chunks": 16, "q_bucket_size": 128, "k_bucket_size": 128}
SLACK = 0.05


@cache
def step(n=TOKENS, **kwargs):
    """(kept after forward, peak of both passes) of a step with its loss, the parameters' gradients being there."""
    settings = {"num_tokens": 256, "dim": DIM, "depth": 2, "heads": 8, "dim_head": 8, "causal": True}
    torch.manual_seed(0)
    model = Transformer(max_seq_len=n, **{**settings, "loss_chunk_size": 128, **kwargs})
    x = torch.randint(model.num_tokens, (1, n))
    zero_grads(model)
    with LiveBytes() as count:
        count.ignore([*model.parameters(), *(p.grad for p in model.parameters()), x])
        loss = model(x, labels=x)
        kept = count.live
        loss.backward()
    unit = n * DIM * 4
    return kept / unit, count.peak / unit


@pytest.mark.parametrize(
    ("head_chunks", "ff_chunks", "figure"), [(1, 1, 15.07), (2, 4, 8.72), (4, 8, 6.75), (8, 16, 5.77)]
)
def test_peak_of_a_step(head_chunks, ff_chunks, figure):
    kept, peak = step(head_chunks=head_chunks, ff_chunks=ff_chunks)
    assert peak <= figure + SLACK, f"{peak:.2f} units where there were {figure}"
    assert kept <= 3.16 + SLACK, f"{kept:.2f} units kept between forward and backward where there were 3.16"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"depth": 6},
        {"heads": 16, "dim_head": 4},
        {"ff_mult": 8, "ff_chunks": 32},
        {"causal": False},
        {"kv_heads": 2},
        {"kv_heads": 1},
        {"window": 64},
        {"positions": "none"},
        {"num_tokens": 1024, "loss_chunk_size": 32},
    ],
    ids=str,
)
def test_the_same_at_any_depth_head_count_and_width_and_with_every_feature(kwargs):
    _, peak = step(**{**MANY_PIECES, **kwargs})
    assert peak <= 5.77 + SLACK, f"{peak:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        {"ff_mult": 16, "ff_chunks": 64},
        {"num_tokens": 6144, "loss_chunk_size": 8},
        {"num_tokens": 6144, "loss_chunk_size": 8, "tie_embeddings": True},
    ],
    ids=str,
)
def test_the_same_with_weights_as_large_as_the_sequence(kwargs):
    """1 unit of one feed-forward's weights, 3 of the vocabulary's: their gradients are there, and not made anew."""
    _, base = step(**MANY_PIECES)
    kept, peak = step(**{**MANY_PIECES, **kwargs})
    assert peak <= 1.03 * base, f"{peak:.2f} units, {base:.2f} with small weights"
    assert kept <= 3.16 + SLACK


def test_a_vocabulary_larger_than_the_tokens_keeps_no_gradient():
    """That of the streams' sum waits for backward, too: both streams are kept for it, and the last step's input."""
    kept, _ = step(num_tokens=TOKENS + 64, loss_chunk_size=16)
    assert kept <= 3.03 + SLACK
    kept, _ = step(num_tokens=TOKENS, loss_chunk_size=16)
    assert 4 <= kept <= 4.05 + SLACK, "beside the streams its gradient and that of the weight, as large"


COSTS = {
    "angles of half a head's width per token": ({"positions": "rotary"}, 5.86),
    "the input once more, on the grid": ({"exact": True}, 6.72),
    "tiles of dropout": ({"dropout": 0.1}, 5.88),
    "tiles of the bias": ({"positions": "alibi"}, 6.05),
    "the shared weight's first gradient": ({"tie_embeddings": True}, 5.90),
}


# Tiles by plain products take a minute each.
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.slow] if what.startswith("tiles") else []) for what in COSTS]
)
def test_what_costs_more(what):
    kwargs, figure = COSTS[what]
    _, peak = step(**{**MANY_PIECES, **kwargs})
    assert peak <= figure + SLACK, f"{peak:.2f} units where there were {figure}"


def test_linear_in_tokens():
    """Twice the tokens in twice the bytes, or less: slabs become a smaller part."""
    (kept, peak), (kept_twice, peak_twice) = step(), step(2 * TOKENS)
    assert peak_twice <= peak
    assert kept_twice <= kept


def test_storing_activations_is_seen_to_cost():
    """The yardstick: without reversal two blocks more keep eight units more at the least; with it, nothing."""
    (shallow, _), (deep, _) = (step(depth=depth, reversible=False) for depth in (1, 3))
    assert deep >= shallow + 8
    (shallow, _), (deep, _) = (step(depth=depth) for depth in (1, 3))
    assert deep == pytest.approx(shallow, abs=0.01)


@pytest.mark.parametrize("keep", [True, "cpu"])
@pytest.mark.parametrize("head_chunks", [1, 8])
def test_kept_attention_costs_each_layer_its_output_and_log_sum_exp(head_chunks, keep):
    """1 + heads / (heads · dim_head) units a layer, to the byte, beside what recomputing keeps; and no layer's more
    at the peak, where a group's output exists anyhow."""
    pieces = {**MANY_PIECES, "head_chunks": head_chunks}
    for depth in (1, 3):
        kept, peak = step(**pieces, depth=depth, keep_attention=keep)
        without, peak_without = step(**pieces, depth=depth)
        assert kept - without == pytest.approx(depth * (1 + 1 / 8), abs=1e-9)
        assert peak - peak_without <= depth * (1 + 1 / 8) + 1e-9
