"""Where somebody could tell, a gradient is made apart and handed to autograd, as if ``.grad`` were not added to."""

from contextlib import contextmanager

import pytest
import torch

from memory_efficient_attention_pytorch import FeedForward, linear_cross_entropy
from tests.accumulating import MAKERS, TOLERANCE, FreshTotals, Head, by_hand, inputs, loss_of, matrices
from tests.agreement import assert_same, filled


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
def test_hooks_that_have_been_removed_count_no_more(watching):
    net, (x,) = Head(), inputs(1)
    filled(net.parameters(), 0.5)
    loss = loss_of(net, x)
    with FreshTotals() as fresh, watching(net, []):
        loss.backward()
    assert fresh.shapes
    with FreshTotals() as fresh:
        loss_of(net, x).backward()
    assert not fresh.shapes


def test_post_accumulate_hooks_see_the_sum_once():
    net, (x,), seen = FeedForward(24, 4, chunks=4), inputs(1), []
    truth = by_hand(net, [x], 0.5)
    before = filled(net.parameters(), 0.5)
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append((p, p.grad.clone())))
    with FreshTotals() as fresh:
        loss_of(net, x).backward()
    assert not fresh.shapes
    assert len(seen) == 4
    found = {id(p): g for p, g in seen}
    assert_same([found[id(p)] for p in net.parameters()], truth, TOLERANCE)
    assert_same(before, truth, TOLERANCE)


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
    before, labels = filled(net.parameters(), 0.5), torch.arange(40).view(2, 20)
    options = {"reduction": reduction, "chunk_size": 7}
    truth = torch.autograd.grad(linear_cross_entropy(x, net.weight, labels, **options).sum(), net.weight)[0]
    linear_cross_entropy(x, 2 * (net.weight / 2), labels, **options).sum().backward()
    assert_same(before[:1], [0.5 + truth], TOLERANCE)


def test_low_precision_is_summed_apart_in_fp32():
    net, (x,) = FeedForward(24, 4, chunks=4).bfloat16(), inputs(1, dtype=torch.bfloat16)
    alone = by_hand(net, [x])
    before = filled(net.parameters(), 0.5)
    with FreshTotals() as fresh:
        loss_of(net, x).backward()
    assert matrices(net) <= set(fresh.shapes)
    assert all(torch.equal(g, 0.5 + a) for g, a in zip(before, alone, strict=True))


def test_frozen_leaves_keep_the_gradient_they_have():
    net, (x,) = FeedForward(24, 4, chunks=4), inputs(1)
    truth = by_hand(net, [x], 0.5)
    before = filled(net.parameters(), 0.5)
    net.net[0].weight.requires_grad_(False)
    loss_of(net, x).backward()
    assert torch.equal(before[0], torch.full_like(before[0], 0.5))
    assert_same(before[1:], truth[1:], TOLERANCE)
