"""Keywords of a reversible sequence: who gets them, and the gradients of what is in them."""

import dataclasses
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import RelativePositionBias, ReversibleSequence
from tests.agreement import assert_same, gradients
from tests.branches import DIM, check, layers, plain, stored, tokens


def test_a_shared_context_gets_its_gradient():
    routes = {"context": [(True, False), (True, True), (False, True)]}
    context = tokens(dtype=torch.float64)
    check(plain().double(), tokens(dtype=torch.float64), 1e-12, [context], routes, context=context)
    check(plain().double(), tokens(dtype=torch.float64, requires_grad=False), 1e-12, [context], routes, context=context)
    context = context.sin()
    blocks, x = plain().double(), tokens(dtype=torch.float64)
    ours, truth = ReversibleSequence(blocks, routes)(x, context=context), stored(blocks, x, routes, context=context)
    assert_same(gradients(ours, [context]), gradients(truth, [context]), 1e-12)


class Modulated(nn.Module):
    """Takes tensors nested in containers, and modules, as keywords."""

    def forward(self, x, films=None, options=None, gate=None):
        for scale, shift in films or ():
            x = x * scale + shift
        if options is not None:
            x = x * options["factor"] + options["nested"][0]
        return torch.tanh(x if gate is None else gate(x))


def test_tensors_nested_in_keywords_get_their_gradients():
    leaves = [tokens(DIM, dtype=torch.float64) for _ in range(4)]
    factor, inner = tokens(1, dtype=torch.float64), tokens(7, 1, dtype=torch.float64)
    blocks = nn.ModuleList([nn.ModuleList([Modulated(), Modulated()]) for _ in range(3)])
    routes = {"films": [(True, True)] * 3, "options": [(False, True)] * 3}
    films = [(leaves[0], leaves[1]), (-leaves[2], leaves[3])]
    options = {"factor": factor, "nested": (inner, "a string", 3)}
    x = tokens(dtype=torch.float64)
    check(blocks, x, 1e-12, [*leaves, factor, inner], routes, films=films, options=options)


def test_modules_passed_as_keywords_get_their_gradients():
    gate = nn.Linear(DIM, DIM).double()
    blocks = nn.ModuleList([nn.ModuleList([Modulated(), Modulated()]) for _ in range(2)])
    check(blocks, tokens(dtype=torch.float64), 1e-12, [gate], {"gate": [(True, False)] * 2}, gate=gate)


@pytest.mark.parametrize("head_chunks", [1, 2])
def test_a_bias_module_shared_by_all_attention_layers(head_chunks):
    bias = RelativePositionBias(4).double()
    blocks = layers(head_chunks=head_chunks).double()
    routes = {"attn_bias": [(True, False)] * 3, "mask": [(True, False)] * 3}
    mask = torch.rand(2, 7) > 0.2
    check(blocks, tokens(dtype=torch.float64), 1e-12, [bias], routes, attn_bias=bias, mask=mask)


def test_keywords_without_a_route_are_refused():
    net = ReversibleSequence(plain(), {"context": [(True, False)] * 3})
    with pytest.raises(ValueError, match=r"mask: expected a keyword of args_route \(context\), got no route"):
        net(tokens(), mask=tokens())


@pytest.mark.parametrize("routes", [[(True, False)] * 2, [(True, False)] * 4, []])
def test_routes_that_do_not_name_every_block_are_refused(routes):
    with pytest.raises(ValueError, match=r"args_route\['context'\]: expected a pair for each of 3 blocks"):
        ReversibleSequence(plain(), {"context": routes})


def test_a_keyword_that_goes_nowhere_or_is_left_out():
    routes = {"context": [(False, False)] * 3}
    x, blocks = tokens(), plain()
    net = ReversibleSequence(blocks, routes)
    assert net(x, context=tokens()).equal(net(x))


@dataclasses.dataclass(frozen=True)
class Context:
    """Keywords in one object."""

    factor: torch.Tensor
    name: str = "context"


class TimesContext(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, context):
        return self.inner(x) * context.factor


def test_tensors_in_a_dataclass_receive_gradients():
    net, found = TimesContext(), []
    for reversible in (True, False):
        factor = torch.ones(4, requires_grad=True)
        sequence = ReversibleSequence([(net, nn.Identity())], {"context": [(True, False)]}, reversible=reversible)
        sequence(torch.ones(1, 2, 4, requires_grad=True), context=Context(factor)).sum().backward()
        found.append(factor.grad)
    torch.testing.assert_close(*found)


def test_some_of_the_blocks_keep_their_routes():
    blocks = [(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4)]
    routes = {"context": [(number % 2 == 0, False) for number in range(4)]}
    net = ReversibleSequence(blocks, routes, exact=True, grid=2**-12)
    part = net[1:]
    assert part.blocks == net.blocks[1:]
    assert not net.eval()[:2].training
    assert (part.args_route["context"], part.exact, part.grid.step) == (routes["context"][1:], True, 2**-12)
    del net[0]
    assert net.args_route["context"] == routes["context"][1:]
    assert net.pop(-1) is not None
    assert net.args_route["context"] == routes["context"][1:-1]
    for add in (net.append, net.extend, lambda block: net.insert(0, block), lambda block: net + block):
        with pytest.raises(NotImplementedError, match="build another ReversibleSequence"):
            add(blocks[0])


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
