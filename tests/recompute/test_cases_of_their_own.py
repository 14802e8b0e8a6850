"""What a repetition lets go of, keeps as it was and refuses, each in a case of its own."""

import copy
import weakref
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import (
    ReversibleSequence,
)
from memory_efficient_attention_pytorch.recompute.by_hand import reason_against
from memory_efficient_attention_pytorch.recompute.kept import KeptResults
from tests.branches import layers, plain, tokens
from tests.memory.live_bytes import LiveBytes


def test_kept_tensors_are_let_go_after_the_repetition():

    kept, owner = KeptResults(), object()
    with kept.keeping():
        kept.fetch(owner, lambda: ("", (torch.zeros(3),)))
    tensors = kept.release()
    gone = weakref.ref(tensors[0])
    with kept.repeating(tensors):
        kept.fetch(owner, lambda: 1 / 0)
    del tensors
    assert gone() is None


def test_after_backward_a_loss_that_is_held_holds_no_streams():

    net, x = ReversibleSequence(layers(2)), tokens(2, 512, 8)
    with LiveBytes() as count:
        count.ignore([*net.parameters(), x])
        loss = net(x).square().mean()
        loss.backward()
        assert count.live <= x.nbytes + sum(p.nbytes for p in net.parameters()) + 4096
    assert loss.grad_fn is not None


def test_keyword_arguments_keep_their_types():

    class Pair(NamedTuple):
        scale: torch.Tensor
        power: int

    class Of(nn.Module):
        def forward(self, x, pair, table):
            assert type(pair) is Pair
            assert type(table) is OrderedDict
            table.move_to_end("a")
            return (x * pair.scale) ** pair.power + list(table.values())[-1]

    x, scale, shift = torch.randn(2, 3), torch.tensor(0.5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    route = {"pair": [(True, False)], "table": [(True, False)]}
    net = ReversibleSequence([(Of(), nn.Identity())], route)
    out = net(x, pair=Pair(scale, 2), table=OrderedDict(a=shift, b=torch.zeros(())))
    found = torch.autograd.grad(out.sum(), (scale, shift))
    y = x + (x * scale) ** 2 + shift
    for ours, true in zip(found, torch.autograd.grad((y + x + y).sum(), (scale, shift)), strict=True):
        torch.testing.assert_close(ours, true)


def test_a_hook_that_changes_what_the_last_block_returns_is_refused_too():

    for change in (lambda y1, y2: (2 * y1, y2), lambda y1, y2: (y1, y2.mul_(2))):
        net = ReversibleSequence(plain())
        net[-1].register_forward_hook(lambda module, args, out, change=change: change(*out))
        with torch.no_grad():
            net(tokens(requires_grad=False))
        with pytest.raises(ValueError, match="a reversible block's output: expected to reach the next block unchanged"):
            net(tokens())


def test_a_forward_of_another_module_is_a_replaced_one():

    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    one.forward = one.forward
    assert reason_against(one, nn.Linear) is None
    one.forward = other.forward
    assert reason_against(one, nn.Linear) == "its forward has been replaced"
    assert reason_against(copy.deepcopy(one), nn.Linear) == "its forward has been replaced"


def test_a_class_that_is_called_otherwise(monkeypatch):

    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: 2 * nn.Module.__call__(self, x), raising=False)
    assert reason_against(nn.Linear(2, 2), nn.Linear) == "its class's forward has been replaced"
