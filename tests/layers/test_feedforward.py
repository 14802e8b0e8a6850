"""FeedForward has pieces of its own, with the weights' gradients summed in place: still the same feed-forward."""

import copy

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Chunked, FeedForward, PreNorm, ReversibleSequence
from tests import reference
from tests.agreement import assert_same, gradients


def altered(kind):
    net = FeedForward(8, 3, chunks=4)
    if kind == "frozen":
        net.net[0].requires_grad_(False)
    elif kind == "tanh":
        net.net[1] = nn.GELU(approximate="tanh")
    elif kind == "replaced":
        net.net = nn.Sequential(nn.Linear(8, 5, bias=False), nn.SiLU(), nn.Dropout(0.0), nn.Linear(5, 8))
    elif kind == "without bias":
        net.net[2] = nn.Linear(24, 8, bias=False)
    elif kind == "parametrised":
        nn.utils.parametrizations.weight_norm(net.net[0])
    elif kind == "hooked":
        net.net[0].register_forward_hook(lambda module, args, out: 2 * out)
    return net


ALTERED = ["plain", "frozen", "tanh", "replaced", "without bias", "parametrised", "hooked"]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", ALTERED)
def test_a_feed_forward_in_chunks_is_the_feed_forward(kind, normed):
    net = altered(kind).double()
    ours = PreNorm(8, net).double() if normed else net
    x = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    wanted = (x, *(p for p in ours.parameters() if p.requires_grad))

    def run():
        out = ReversibleSequence([(nn.Identity(), ours)])(x)
        return out, *gradients(out, wanted)

    chunked = run()
    net.chunks = 1
    assert_same(chunked, run(), 1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_feed_forward_in_chunks_in_bfloat16(autocast):
    net, x = FeedForward(16, 4, chunks=8), torch.randn(2, 64, 16)
    truth_net = copy.deepcopy(net).double()
    truth = gradients(truth_net.net(x.bfloat16().double()), truth_net.parameters())
    low, x = (net, x.bfloat16().float()) if autocast else (net.bfloat16(), x.bfloat16())

    def run(net):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = net(x)
        return gradients(out, low.parameters())

    for ours, naive, true in zip(run(low), run(low.net), truth, strict=True):
        assert ours.dtype == naive.dtype
        reference.assert_as_accurate("parameter", ours.bfloat16(), naive.bfloat16(), true)


def test_a_mixer_of_tokens_in_chunks_of_features_is_normalised_whole():
    """MLP-Mixer's: independent along the features, over which the norm before it goes."""

    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            return self.inner(x.mT).mT

    net, x = PreNorm(8, Chunked(Mixes(), chunks=2, dim=2)), torch.randn(2, 16, 8)
    blocks = [(net, PreNorm(8, FeedForward(8)))]
    torch.testing.assert_close(
        ReversibleSequence(blocks)(x.requires_grad_()), ReversibleSequence(blocks, reversible=False)(x)
    )


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Embedding(10, 16), torch.randint(0, 10, (2, 8))),
        (nn.Sequential(nn.Linear(16, 1), nn.Flatten(1)), torch.randn(2, 8, 16)),
    ],
)
def test_chunks_of_a_module_that_changes_the_rank(module, x):
    torch.testing.assert_close(Chunked(module, chunks=2)(x), module(x))


def test_a_feed_forward_whose_first_layer_has_no_bias():
    net, x = FeedForward(8, 3, chunks=4), torch.randn(2, 13, 8)
    net.net[0] = nn.Linear(8, 24, bias=False)
    torch.testing.assert_close(net(x), net.net(x))
