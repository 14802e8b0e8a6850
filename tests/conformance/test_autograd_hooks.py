"""Hooks on tensors, nodes and modules see what autograd shows them, over everything that can be differentiated."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.autograd.graph import get_gradient_edge, register_multi_grad_hook

from tests.agreement import assert_same, backward, cotangent_of, filled, gradients, plus
from tests.conformance.subjects import SUBJECTS


@contextmanager
def tensor_hook(leaf, seen):
    with leaf.register_hook(lambda g: seen.append(g.clone())):
        yield


@contextmanager
def hook_on_many(leaf, seen):
    with register_multi_grad_hook([leaf], lambda g: seen.append(g[0].clone())):
        yield


@contextmanager
def hook_before_node(leaf, seen):
    with get_gradient_edge(leaf).node.register_prehook(lambda g: seen.append(g[0].clone())):
        yield


@contextmanager
def hook_after_node(leaf, seen):
    with get_gradient_edge(leaf).node.register_hook(lambda _, g: seen.append(g[0].clone())):
        yield


@pytest.mark.parametrize("hook", [tensor_hook, hook_on_many, hook_before_node, hook_after_node])
def test_hooks_see_the_whole_gradient_of_this_pass_alone_and_once(subject, hook):
    leaves, truth = subject.leaves, subject.true_gradients()
    filled(leaves)
    out = subject()
    seen = [[] for _ in leaves]
    with ExitStack() as hooks:
        for leaf, record in zip(leaves, seen, strict=True):
            hooks.enter_context(hook(leaf, record))
        backward(out)
    assert [len(record) for record in seen] == [1] * len(leaves)
    assert_same([record[0] for record in seen], truth, subject.tolerance)
    assert_same([leaf.grad for leaf in leaves], plus(truth), subject.tolerance)


def test_hooks_may_change_the_gradient(subject):
    leaves, truth = subject.leaves, subject.true_gradients()
    for leaf in leaves:
        leaf.register_hook(lambda g: 3 * g)
    assert_same(gradients(subject(), leaves), [3 * g for g in truth], subject.tolerance)
    filled(leaves)
    backward(subject())
    assert_same([leaf.grad for leaf in leaves], plus([3 * g for g in truth]), subject.tolerance)


def test_hooks_after_accumulation_see_the_sum_once(subject):
    leaves, truth, seen = subject.leaves, subject.true_gradients(), []
    filled(leaves)
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(lambda leaf: seen.append((leaf, leaf.grad.clone())))
    backward(subject())
    assert len(seen) == len(leaves)
    found = {id(leaf): g for leaf, g in seen}
    assert_same([found[id(leaf)] for leaf in leaves], plus(truth), subject.tolerance)


def test_an_optimizer_stepping_in_hooks(request, subject):
    """Each leaf steps as soon as its gradient is there, while others are still to be found."""
    other = SUBJECTS[request.node.callspec.params["subject"]]()
    with torch.no_grad():
        for mine, theirs in zip(subject.leaves, other.leaves, strict=True):
            theirs.copy_(mine)
        for mine, theirs in zip(subject.inputs, other.inputs, strict=True):
            theirs.copy_(mine)
    places = {leaf: i for i, leaf in enumerate(subject.leaves)}
    optimizers = {leaf: torch.optim.SGD([leaf], lr=0.01, momentum=0.9) for leaf in subject.leaves}

    def step_now(leaf):
        optimizers[leaf].step()
        optimizers[leaf].zero_grad(set_to_none=places[leaf] % 2 == 0)

    for leaf in subject.leaves:
        leaf.register_post_accumulate_grad_hook(step_now)
    after_all = torch.optim.SGD(other.leaves, lr=0.01, momentum=0.9)
    for _ in range(2):
        backward(subject())
        after_all.zero_grad()
        backward(other.truth(*other.inputs))
        after_all.step()
    assert_same(subject.leaves, other.leaves, 100 * subject.tolerance)


def test_hooks_on_the_module_run_and_may_change_what_it_returns(subject):
    seen = []
    subject.net.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    subject.net.register_forward_hook(lambda module, inputs, out: (seen.append("after"), out * out.sin())[1])
    ours = subject()
    assert seen == ["before", "after"]
    truth = subject.truth(*subject.inputs)
    truth = truth * truth.sin()
    assert_same([ours], [truth], subject.tolerance)
    assert_same(gradients(ours, subject.leaves), gradients(truth, subject.leaves), 10 * subject.tolerance)
    assert seen == ["before", "after"]


def test_a_backward_hook_on_the_module_sees_its_cotangent_once(subject):
    if not any(x.requires_grad for x in subject.inputs):
        pytest.skip("a full backward hook is about inputs that want a gradient")
    truth, seen = subject.true_gradients(), []
    subject.net.register_full_backward_hook(lambda module, of_in, of_out: seen.append(of_out[0].clone()))
    out = subject()
    assert_same(gradients(out, subject.leaves), truth, subject.tolerance)
    assert_same(seen, [cotangent_of(out)], 0.0)
