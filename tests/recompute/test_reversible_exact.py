"""Exact mode: streams on a grid are rebuilt bit for bit, and gradients are those of storing everything to the bit."""

import warnings

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import ReversibleSequence
from tests.agreement import assert_same, difference, furthest, gradients, with_seed
from tests.branches import DIM, IN_PIECES, layers, plain, stored, tokens, trainable


class Watched(nn.Module):
    """Keeps a copy of each input that it sees."""

    def __init__(self, module, seen):
        super().__init__()
        self.module, self.seen = module, seen

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.module(x)


def deep_step(exact, depth=96):
    """One bf16 step of a deep network whose branches are strong: its streams' history, its gradients, and the truth's.

    Per step of the network the second stream, seen first in the forward pass and then as it was rebuilt.
    """
    torch.manual_seed(0)
    blocks, x, seen = layers(depth, dim=32, heads=2), tokens(2, 16, 32), []
    with torch.no_grad():
        for f, g in blocks:
            f.fn.to_out.weight.mul_(3), g.fn.net[2].weight.mul_(3)
    watched = [[Watched(f, seen), Watched(g, seen)] for f, g in blocks]

    def run(net):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        return out, *gradients(out, (x, *blocks.parameters()))

    ours = run(ReversibleSequence(watched, exact=exact))
    assert len(seen) == 2 * 2 * depth, "each branch once forward and once in backward"
    history = [*zip(seen[: 2 * depth], reversed(seen[2 * depth :]), strict=True)]
    truth = run(ReversibleSequence(blocks, exact=exact, reversible=False))
    return history, ours, truth


def test_exact_mode_at_depth_96_under_bfloat16_autocast():
    """Every stream element is rebuilt bit for bit and the gradients are those of storing everything: 0.0 apart."""
    history, ours, truth = deep_step(exact=True)
    assert all(stream.equal(rebuilt) for stream, rebuilt in history)
    assert furthest(difference(mine, true) for mine, true in zip(ours, truth, strict=True)) == 0.0
    assert all(stream.dtype == torch.float32 for stream, _ in history)
    assert 16 < max(stream.abs().max() for stream, _ in history) < 256, "the streams grow, and stay in the exact range"


def test_without_exact_mode_streams_are_rebuilt_to_rounding_only():
    """What exact mode is for: of the same network's first stream few elements come back, and the gradient suffers."""
    history, ours, truth = deep_step(exact=False)
    first, rebuilt = history[0]
    assert (first == rebuilt).double().mean() < 0.2
    assert furthest(difference(mine, true) for mine, true in zip(ours, truth, strict=True)) > 1e-3


@pytest.mark.parametrize("kind", ["plain", "layers"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_mode_in_any_dtype(dtype, kind):
    """The modules' dtype is theirs; streams are fp32 at least. Dropout draws the same both times."""
    blocks = (plain(dropout=0.3) if kind == "plain" else layers()).to(dtype)
    x = tokens(dtype=dtype)

    def run(**kwargs):
        out = with_seed(lambda: ReversibleSequence(blocks, exact=True, **kwargs)(x))
        assert out.dtype == dtype
        return out, *gradients(out, trainable(x, blocks))

    assert_same(run(), run(reversible=False), 0.0)


@pytest.mark.parametrize("autocast", [False, True])
def test_exact_mode_in_pieces(autocast):
    """Also branches that are added piece by piece: stored or rebuilt, not a bit apart."""
    blocks, x = layers(**IN_PIECES), tokens(2, 12, DIM)

    def run(**kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = ReversibleSequence(blocks, exact=True, **kwargs)(x)
        return out, *gradients(out, trainable(x, blocks))

    assert_same(run(), run(reversible=False), 0.0)


def test_exact_mode_differs_from_storing_plainly_by_its_grid_only():
    blocks, x = plain(), tokens(requires_grad=False)
    out = ReversibleSequence(blocks, exact=True, grid=2**-10)(x)
    assert (out / 2**-10).frac().eq(0).all(), "sums of multiples of the grid are multiples of it"
    # The input and six branches are each rounded by half a step at most, and branches stretch earlier errors.
    assert 0 < (out - stored(blocks, x)).abs().max() < 20 * 2**-10


def test_leaving_the_exact_range_is_reported_once_and_survived():
    blocks, x = plain(), tokens()
    net, large = ReversibleSequence(blocks, exact=True), 300 * x
    with pytest.warns(UserWarning, match=r"outside the exact range of 256 \(grid 1\.53e-05\)") as caught:
        out = net(large)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = gradients(out, trainable(blocks))
        truth = gradients(stored(blocks, large), trainable(blocks))
        net(x)
        ReversibleSequence(blocks, exact=True, grid=2**-12)(large)
    assert_same(ours, truth, 1e-2)


@pytest.mark.parametrize("grid", [0.0, -1.0, 0.1, 3 * 2**-16, float("inf"), float("nan")])
def test_a_grid_that_is_no_power_of_two_is_refused(grid):
    with pytest.raises(ValueError, match="grid: expected a power of two"):
        ReversibleSequence(plain(), exact=True, grid=grid)
