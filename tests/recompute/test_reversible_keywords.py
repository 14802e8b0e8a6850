"""Keywords of a reversible sequence: who gets them, and the gradients of what is in them."""

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
