"""Positions hold no state: right after a detour over the meta device, and in fp32 whatever the model is cast to."""

import math

import pytest
import torch

from memory_efficient_attention_pytorch import RelativePositionBias, Transformer
from memory_efficient_attention_pytorch.layers.positions import AlibiBias, RotaryEmbedding
from tests.agreement import assert_same

SHAPE = {"num_tokens": 32, "max_seq_len": 64, "dim": 24, "depth": 2, "heads": 3, "dim_head": 8, "causal": True}


@pytest.mark.parametrize("kwargs", [{"positions": "rotary"}, {"positions": "alibi", "head_chunks": 3}, {}], ids=str)
def test_a_model_built_without_memory_is_the_model_whose_weights_it_loads(kwargs):
    torch.manual_seed(0)
    model, x = Transformer(**SHAPE, **kwargs), torch.randint(32, (2, 40))
    assert not list(model.buffers())
    with torch.device("meta"):
        empty = Transformer(**SHAPE, **kwargs)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    with torch.device("meta"):
        assigned = Transformer(**SHAPE, **kwargs)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for other in (empty, assigned):
        assert_same([other(x)], [model(x)], 0.0)


def rotations(dim, positions):
    return [[p * 10000.0 ** (-2 * i / dim) for i in range(dim // 2)] for p in positions]


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
def test_angles_and_slopes_are_of_fp32_in_a_model_of_any_dtype(cast):
    positions = [0, 1, 100, 4000, 8191, 999_999, 2**24 + 1]
    angles = torch.tensor(rotations(16, positions), dtype=torch.float64)
    for found, truth in zip(
        cast(RotaryEmbedding(16))(torch.tensor(positions)), (angles.cos(), angles.sin()), strict=True
    ):
        assert found.dtype == torch.float32
        assert (found.double() - truth).abs().max() < 5e-7
    bias = cast(AlibiBias(6))(torch.tensor([8191]), torch.tensor([0, 4001, 8191]))
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    truth = torch.tensor([[[-s * 8191, -s * 4190, 0.0]] for s in slopes])
    assert bias.dtype == torch.float32
    assert bias.tolist() == truth.tolist()


@pytest.mark.parametrize("base", [0.3, 500_000.0])
def test_positions_may_lie_between_tokens_and_bases_be_any(base):
    positions = torch.tensor([[0.25, 100_000.5], [-3.0, 7.0]])
    angles = positions.double()[..., None] * base ** (-torch.arange(0, 16, 2).double() / 16)
    for found, truth in zip(RotaryEmbedding(16, base)(positions), (angles.cos(), angles.sin()), strict=True):
        assert (found.double() - truth).abs().max() < 5e-7


def test_a_model_takes_the_base_of_its_rotary_positions():
    torch.manual_seed(0)
    model, x = Transformer(**SHAPE, positions="rotary", rotary_base=500_000.0), torch.randint(32, (1, 40))
    other = Transformer(**SHAPE, positions="rotary")
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), other(x))
    other.rotary = RotaryEmbedding(8, 500_000.0)
    assert_same([model(x)], [other(x)], 0.0)
    for base in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"rotary_base: expected a number above 0, got {base}"):
            Transformer(**SHAPE, rotary_base=base)
        with pytest.raises(ValueError, match=f"base: expected a number above 0, got {base}"):
            RotaryEmbedding(8, base)


@pytest.mark.parametrize("heads", [1, 2, 8, 12])
def test_slopes_are_those_of_the_paper(heads):
    def of_power(count):
        start = 2 ** (-(2 ** -(math.log2(count) - 3)))
        return [start ** (i + 1) for i in range(count)]

    lower = 2 ** math.floor(math.log2(heads))
    truth = of_power(lower) + of_power(2 * lower)[0::2][: heads - lower]
    torch.testing.assert_close(AlibiBias(heads).slopes(), torch.tensor(truth))


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_a_model_in_low_precision_is_near_the_same_model_in_full(positions):
    torch.manual_seed(0)
    model = Transformer(**SHAPE, positions=positions).bfloat16()
    full = Transformer(**SHAPE, positions=positions)
    full.load_state_dict(model.state_dict())
    x = torch.randint(32, (1, 3000))
    assert (model(x).float() - full(x)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"num_buckets": 2}, "num_buckets"),
        ({"num_buckets": 1, "bidirectional": False}, "num_buckets"),
        ({"num_buckets": 32, "max_distance": 8}, "max_distance"),
    ],
    ids=str,
)
def test_buckets_that_leave_nothing_for_the_logarithm(kwargs, word):
    with pytest.raises(ValueError, match=f"^{word}: expected"):
        RelativePositionBias(2, **kwargs)
