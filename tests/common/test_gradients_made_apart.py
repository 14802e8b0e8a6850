"""Where somebody could tell, a gradient is made apart and handed to autograd, as if ``.grad`` were not added to."""

import copy
from contextlib import contextmanager

import pytest
import torch

from memory_efficient_attention_pytorch import FeedForward, linear_cross_entropy
from tests.accumulating import MAKERS, TOLERANCE, FreshTotals, Head, by_hand, filled, inputs, loss_of, matrices
from tests.agreement import assert_same, one_thread

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@contextmanager
def hook(net, seen):
    with net.weight.register_hook(lambda g: seen.append(g.clone())):
        yield


@contextmanager
def hook_on_many(net, seen):
    with torch.autograd.graph.register_multi_grad_hook([net.weight], lambda g: seen.append(g[0].clone())):
        yield


@contextmanager
def hook_on_node(net, seen):
    node = torch.autograd.graph.get_gradient_edge(net.weight).node
    with node.register_prehook(lambda g: seen.append(g[0].clone())):
        yield


@contextmanager
def hook_after_node(net, seen):
    node = torch.autograd.graph.get_gradient_edge(net.weight).node
    with node.register_hook(lambda _, g: seen.append(g[0].clone())):
        yield


@pytest.mark.parametrize("watching", [hook, hook_on_many, hook_on_node, hook_after_node])
def test_hooks_see_the_gradient_of_this_pass_alone(watching):
    net, (x,), seen = Head(), inputs(1), []
    alone = by_hand(net, [x])
    filled(net, 0.5)
    loss = loss_of(net, x)
    with watching(net, seen):
        loss.backward()
    assert_same(seen, alone[:1], TOLERANCE)
    assert_same([net.weight.grad, net.bias.grad], [g + 0.5 for g in alone], TOLERANCE)
    filled(net, 0.5)
    with FreshTotals() as fresh:
        loss_of(net, x).backward()
    assert not fresh.shapes, "hooks that have been removed count no more"


def test_a_hook_may_change_the_gradient():
    net, (x,) = FeedForward(24, 4, chunks=4), inputs(1)
    alone = by_hand(net, [x])
    filled(net, 0.5)
    for p in net.parameters():
        p.register_hook(lambda g: 3 * g)
    loss_of(net, x).backward()
    assert_same([p.grad for p in net.parameters()], [3 * g + 0.5 for g in alone], TOLERANCE)


def test_post_accumulate_hooks_see_the_sum_once():
    net, (x,), seen = FeedForward(24, 4, chunks=4), inputs(1), []
    truth = by_hand(net, [x], 0.5)
    before = filled(net, 0.5)
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append((p, p.grad.clone())))
    with FreshTotals() as fresh:
        loss_of(net, x).backward()
    assert not fresh.shapes
    assert len(seen) == 4
    found = {id(p): g for p, g in seen}
    assert_same([found[id(p)] for p in net.parameters()], truth, TOLERANCE)
    assert_same(before, truth, TOLERANCE)


def test_an_optimizer_that_steps_in_hooks():
    net, batches = FeedForward(24, 4, chunks=4), inputs(3)
    other = copy.deepcopy(net)

    def step(p):
        with torch.no_grad():
            p -= 0.01 * p.grad
        p.grad.zero_()

    filled(net, 0.0)
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    for x in batches:
        loss_of(net, x).backward()
        gradients = by_hand(other, [x])
        with torch.no_grad():
            for p, g in zip(other.parameters(), gradients, strict=True):
                p -= 0.01 * g
    assert_same(list(net.parameters()), list(other.parameters()), TOLERANCE)


@pytest.mark.parametrize("kind", ["feed-forward", "attention", "loss", "losses"])
def test_autograd_grad_leaves_it_alone(kind):
    net, (x,) = MAKERS[kind](), inputs(1)
    truth = by_hand(net, [x])
    before = filled(net, 0.5)
    found = torch.autograd.grad(loss_of(net, x), list(net.parameters()))
    assert_same(found, truth, TOLERANCE)
    assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(g, torch.full_like(g, 0.5)) for g in before)


@pytest.mark.parametrize("kind", ["feed-forward", "attention", "loss", "losses"])
def test_only_the_leaves_that_backward_is_asked_for(kind):
    net, (x,) = MAKERS[kind](), inputs(1, requires_grad=True)
    wanted, *others = net.parameters()
    truth = by_hand(net, [x], 0.5)[0]
    for leaves in ([x], [wanted], [x, wanted]):
        filled(net, 0.5)
        loss_of(net, x).backward(inputs=leaves)
        expected = truth if wanted in set(leaves) else torch.full_like(wanted, 0.5)
        assert_same([wanted.grad], [expected], TOLERANCE)
        assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in others)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("retain_graph", [None, False])
@pytest.mark.parametrize("kind", ["feed-forward", "losses"])
def test_a_pass_that_makes_a_graph_makes_a_new_gradient(kind, retain_graph):
    net, (x,) = MAKERS[kind](), inputs(1)
    truth = by_hand(net, [x], 0.5)
    before = filled(net, 0.5)
    loss_of(net, x).backward(create_graph=True, retain_graph=retain_graph)
    assert all(torch.equal(g, torch.full_like(g, 0.5)) for g in before)
    assert_same([p.grad.detach() for p in net.parameters()], truth, TOLERANCE)
    with pytest.raises(RuntimeError, match="differentiable once"):
        sum(p.grad.sum() for p in net.parameters()).backward()
    net.zero_grad()  # a gradient with a graph refers to its leaf, which refers to it


UNGAINLY = {
    "strided": lambda full: full.repeat(1, 2)[:, ::2],
    "transposed": lambda full: full.t().contiguous().t(),
    "of another type": lambda full: full.as_subclass(type("Other", (torch.Tensor,), {})),
    "sparse": lambda full: full.to_sparse(),
    "with a graph": lambda full: full.clone().requires_grad_(),
}


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("what", UNGAINLY)
@pytest.mark.parametrize("kind", ["losses", "loss"])
def test_gradients_of_another_kind_are_left_to_autograd(kind, what):
    net, (x,) = MAKERS[kind](), inputs(1)
    truth = by_hand(net, [x], 0.5)[0]
    net.weight.grad = UNGAINLY[what](torch.full_like(net.weight, 0.5))
    with FreshTotals() as fresh:
        loss_of(net, x).backward()
    assert net.weight.shape in fresh.shapes
    assert_same([net.weight.grad.detach().as_subclass(torch.Tensor)], [truth], TOLERANCE)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_weight_that_is_no_leaf(reduction):
    """Nobody asks for its gradient, which PyTorch would warn of."""
    net, (x,) = Head(reduction), inputs(1)
    before, labels = filled(net, 0.5), torch.arange(40).view(2, 20)
    options = {"reduction": reduction, "chunk_size": 7}
    truth = torch.autograd.grad(linear_cross_entropy(x, net.weight, labels, **options).sum(), net.weight)[0]
    linear_cross_entropy(x, 2 * (net.weight / 2), labels, **options).sum().backward()
    assert_same(before[:1], [0.5 + truth], TOLERANCE)


def test_low_precision_is_summed_apart_in_fp32():
    net, (x,) = FeedForward(24, 4, chunks=4).bfloat16(), inputs(1, dtype=torch.bfloat16)
    alone = by_hand(net, [x])
    before = filled(net, 0.5)
    with FreshTotals() as fresh:
        loss_of(net, x).backward()
    assert matrices(net) <= set(fresh.shapes)
    assert all(torch.equal(g, 0.5 + a) for g, a in zip(before, alone, strict=True))


def test_frozen_leaves_keep_the_gradient_they_have():
    net, (x,) = FeedForward(24, 4, chunks=4), inputs(1)
    truth = by_hand(net, [x], 0.5)
    before = filled(net, 0.5)
    net.net[0].weight.requires_grad_(False)
    loss_of(net, x).backward()
    assert torch.equal(before[0], torch.full_like(before[0], 0.5))
    assert_same(before[1:], truth[1:], TOLERANCE)
