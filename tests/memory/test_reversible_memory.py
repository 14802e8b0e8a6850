"""Reversible blocks keep two streams at any depth, and compute every branch once more and no more than that."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import ReversibleSequence
from tests.agreement import products
from tests.branches import DIM, layers, plain, tokens
from tests.memory.live_bytes import LiveBytes, saved_bytes


def unlike(depth, **kwargs):
    """A network, one step behind it so that parameter gradients exist, and an input."""
    net = ReversibleSequence(layers(depth, dim=32, heads=2), **kwargs)
    x = tokens(1, 256, 32)
    net(x).sum().backward()
    return net, x


@pytest.mark.parametrize("kwargs", [{}, {"exact": True}], ids=str)
def test_memory_is_the_same_at_any_depth(kwargs):
    def measure(depth):
        net, x = unlike(depth, **kwargs)
        with LiveBytes() as forward:
            out = net(x)
            kept = forward.live
        with LiveBytes() as backward:
            out.backward(torch.ones(()).expand(x.shape))
        parameters = sum(p.nbytes for p in net.parameters())
        return kept - out.nbytes, saved_bytes(net, x) - parameters, forward.peak, backward.peak

    (kept, saved, forward, backward), deeper = measure(2), measure(32)
    unit = 256 * 32 * 4
    assert saved == deeper[1] == 2 * unit, "the two streams"
    # The first parts of an exact network's report are one number per step.
    slack = 0 if not kwargs else 4 * 2 * 32
    assert deeper[0] <= kept + slack
    assert deeper[2] <= forward + slack
    assert deeper[3] <= backward
    stored_net, x = unlike(32, reversible=False)
    assert saved_bytes(stored_net, x) > 32 * 4 * unit


def test_every_branch_is_recomputed_once():
    """Two layers a branch: a product each forward, each again, and two gradients each."""
    blocks, x = plain(depth=3), tokens()
    with LiveBytes() as forward:
        out = ReversibleSequence(blocks)(x)
    with LiveBytes() as backward:
        out.sum().backward()
    branches = 2 * 3
    assert products(forward) == 2 * branches
    assert products(backward) == (2 + 4) * branches


def test_nothing_is_computed_for_an_input_that_needs_no_gradient():
    """The first branch's own input ends the chain: its weight's gradient is all that is wanted of it."""
    net = ReversibleSequence([(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))])
    for requires_grad, of_first in ((True, 3), (False, 2)):
        out = net(tokens(requires_grad=requires_grad))
        with LiveBytes() as count:
            out.sum().backward()
        assert products(count) == 3 + of_first


def test_after_backward_a_loss_that_is_held_holds_no_streams():
    net, x = ReversibleSequence(layers(2)), tokens(2, 512, 8)
    with LiveBytes() as count:
        count.ignore([*net.parameters(), x])
        loss = net(x).square().mean()
        loss.backward()
        assert count.live <= x.nbytes + sum(p.nbytes for p in net.parameters()) + 4096
    assert loss.grad_fn is not None
