"""What autograd's users may do, and find right or refused: one suite over everything that can be differentiated."""

import re

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.agreement import assert_same, backward, filled, gradients, plus, with_seed
from tests.conformance.cases import result_or_message
from tests.conformance.subjects import DROPPING, EVERYTHING

SECOND_TIME, ONCE, IN_PLACE = "second time", "differentiable once|derivative", "modified by an inplace operation"


# The gradients


def test_outputs_and_gradients_are_those_of_storing_everything(subject):
    ours, truth = subject(), subject.truth(*subject.inputs)
    assert_same([ours], [truth], subject.tolerance)
    assert_same(gradients(ours, subject.leaves), gradients(truth, subject.leaves), subject.tolerance)


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_the_same_in_both_passes(name):
    """With the seed fixed the output is a smooth function of the leaves, and the gradients are its derivatives."""
    subject = DROPPING[name]()
    if not subject.smooth:
        pytest.skip("rounded to a grid")
    assert torch.autograd.gradcheck(lambda *_: with_seed(subject), tuple(subject.leaves), fast_mode=True)


def test_cotangents_of_any_layout_are_left_alone(subject):
    ours, truth = subject(), subject.truth(*subject.inputs)
    strided = torch.randn(*reversed(ours.shape), 2, dtype=ours.dtype)[..., 0].permute(list(reversed(range(ours.ndim))))
    kept = strided.clone()
    for given in (strided, torch.tensor(0.7, dtype=ours.dtype).expand(ours.shape)):
        found = [torch.autograd.grad(out, subject.leaves, given, retain_graph=True) for out in (ours, truth)]
        assert_same(*found, subject.tolerance)
        for gradient in found[0]:
            gradient.zero_()  # what was handed out is the caller's
    assert strided.equal(kept)


def test_the_input_and_the_output_may_be_used_elsewhere(subject):
    def run(net):
        inputs = [x.sin() if x.requires_grad else x for x in subject.inputs]
        out = net(*inputs)
        return gradients(out * out.sin() + sum(x.sum() for x in inputs), subject.leaves)

    assert_same(run(subject.net), run(subject.truth), 10 * subject.tolerance)


# Several passes


def test_backward_through_a_kept_graph(any_subject):
    out = with_seed(any_subject)
    first = gradients(out, any_subject.leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for gradient in first:
        gradient.zero_()
    again = gradients(out, any_subject.leaves, seed=2, retain_graph=True)
    last = gradients(out, any_subject.leaves)
    assert_same(last, kept, any_subject.tolerance)
    assert not all(a.equal(b) for a, b in zip(again, kept, strict=True))
    with pytest.raises(RuntimeError, match=SECOND_TIME):
        gradients(out, any_subject.leaves)


def test_gradients_are_linear_in_the_cotangent_of_a_kept_graph(subject):
    out = subject()
    first, second = (torch.randn(out.shape, dtype=out.dtype) for _ in range(2))
    one, two, both = (
        torch.autograd.grad(out, subject.leaves, c, retain_graph=True) for c in (first, second, 3 * first - second / 7)
    )
    expected = [3 * a - b / 7 for a, b in zip(one, two, strict=True)]
    assert_same(both, expected, 10 * subject.tolerance)


def test_several_forwards_before_a_backward(any_subject):
    """Each backward has what its own forward pass used and drew, in any order and together."""
    leaves, others = any_subject.leaves, any_subject.more_inputs()
    alone = gradients(with_seed(any_subject, 3), leaves)
    first, second = with_seed(any_subject, 3), with_seed(lambda: any_subject.net(*others), 4)
    of_second = gradients(second, leaves, allow_unused=True)
    assert_same(gradients(first, leaves), alone, any_subject.tolerance)
    first, second = with_seed(any_subject, 3), with_seed(lambda: any_subject.net(*others), 4)
    together = gradients(first + second, leaves)
    expected = [a if b is None else a + b for a, b in zip(alone, of_second, strict=True)]
    assert_same(together, expected, 10 * any_subject.tolerance)


def test_gradients_of_several_passes_are_summed_in_place(subject):
    """Of a graph that is kept, and of another batch."""
    leaves, truth = subject.leaves, subject.true_gradients()
    before = filled(leaves)
    out = subject()
    backward(out, retain_graph=True)
    backward(out)
    backward(subject())
    assert all(leaf.grad is g for leaf, g in zip(leaves, before, strict=True))
    assert_same(before, [0.5 + 3 * g for g in truth], 10 * subject.tolerance)


def test_a_gradient_that_comes_or_goes_between_forward_and_backward(subject):
    leaves, truth = subject.leaves, subject.true_gradients()
    filled(leaves)
    out = subject()
    for leaf in leaves:
        leaf.grad = None
    backward(out)
    assert_same([leaf.grad for leaf in leaves], truth, subject.tolerance)
    for leaf in leaves:
        leaf.grad = None
    out = subject()
    filled(leaves)
    backward(out)
    assert_same([leaf.grad for leaf in leaves], plus(truth), subject.tolerance)


def test_a_second_derivative_is_refused_or_right(subject):
    leaves = subject.leaves

    def second(out):
        found = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        for leaf in leaves:
            leaf.grad = None
        sum(g.square().sum() for g in found).backward()
        return [leaf.grad for leaf in leaves]

    ours = result_or_message(lambda: second(subject()))
    if isinstance(ours, str):
        assert re.search(ONCE, ours)
    else:
        assert not subject.once
        assert_same(ours, second(subject.truth(*subject.inputs)), 10 * subject.tolerance)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_pass_that_makes_a_graph_makes_a_new_gradient(subject):
    leaves, truth = subject.leaves, subject.true_gradients()
    for retain_graph in (None, False):
        before = filled(leaves)
        backward(subject(), create_graph=True, retain_graph=retain_graph)
        assert all(g.equal(torch.full_like(g, 0.5)) for g in before)
        assert_same([leaf.grad.detach() for leaf in leaves], plus(truth), subject.tolerance)
        for leaf in leaves:
            leaf.grad = None  # a gradient with a graph refers to its leaf, which refers to it


# What is asked for


def test_autograd_grad_of_any_one_leaf(subject):
    truth, leaves = subject.true_gradients(), subject.leaves
    before, out = filled(leaves), subject()
    for leaf, true in zip(leaves, truth, strict=True):
        assert_same(gradients(out, [leaf], retain_graph=True), [true], subject.tolerance)
    assert all(leaf.grad is g for leaf, g in zip(leaves, before, strict=True))
    assert all(g.equal(torch.full_like(g, 0.5)) for g in before)


def test_backward_of_any_one_leaf_adds_to_no_other(subject):
    truth, leaves = subject.true_gradients(), subject.leaves
    out = subject()
    for leaf, true in zip(leaves, truth, strict=True):
        before = filled(leaves)
        backward(out, inputs=[leaf], retain_graph=True)
        assert_same([leaf.grad], [0.5 + true], subject.tolerance)
        assert all(
            g.equal(torch.full_like(g, 0.5)) for other, g in zip(leaves, before, strict=True) if other is not leaf
        )


def test_frozen_leaves(subject):
    """Each leaf in turn is the only one that wants a gradient, and every third one wants none."""
    truth, leaves = subject.true_gradients(), subject.leaves
    for trained in [[leaf] for leaf in leaves] + [[x for i, x in enumerate(leaves) if i % 3 != k] for k in range(3)]:
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is one for one in trained))
            leaf.grad = None
        backward(subject())
        for leaf, true in zip(leaves, truth, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.requires_grad:
                assert_same([leaf.grad], [true], subject.tolerance)


def test_inputs_without_a_gradient(subject):
    """The parameters get theirs all the same, and frozen leaves keep the gradient that they have."""
    truth = subject.true_gradients()
    before = filled(subject.leaves)
    for x in subject.inputs:
        x.requires_grad_(False)
    out = subject()
    assert out.requires_grad == any(True for _ in subject.net.parameters())
    if out.requires_grad:
        backward(out)
    expected = [0.5 + t if leaf.requires_grad else g for leaf, g, t in zip(subject.leaves, before, truth, strict=True)]
    assert_same(before, expected, subject.tolerance)


def test_nothing_wants_a_gradient(subject):
    out = subject()
    for leaf in subject.leaves:
        leaf.requires_grad_(False)
    frozen = subject()
    assert not frozen.requires_grad
    assert_same([frozen], [out.detach()], subject.tolerance)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(any_subject, context):
    out = with_seed(any_subject)
    with context():
        without = with_seed(any_subject)
    assert not without.requires_grad
    assert_same([without], [out.detach()], any_subject.tolerance)


def test_eval_mode(any_subject):
    """No dropout, and gradients as in training without it."""
    if any_subject.drops and not list(any_subject.net.parameters()):
        pytest.skip("a function's dropout is an argument")
    any_subject.net.eval()
    if isinstance(any_subject.truth, torch.nn.Module):
        any_subject.truth.eval()
    out, truth = any_subject(), any_subject.truth(*any_subject.inputs)
    assert_same([out], [truth], any_subject.tolerance)
    assert_same(gradients(out, any_subject.leaves), gradients(truth, any_subject.leaves), any_subject.tolerance)


# What is saved


def test_what_is_saved_may_be_kept_elsewhere(any_subject):
    leaves = any_subject.leaves
    truth = gradients(with_seed(any_subject), leaves)
    with saved_tensors_hooks(torch.clone, torch.clone):
        out = with_seed(any_subject)
    assert_same(gradients(out, leaves, retain_graph=True), truth, any_subject.tolerance)
    assert_same(gradients(out, leaves), truth, any_subject.tolerance)
    with save_on_cpu():
        out = with_seed(any_subject)
    assert_same(gradients(out, leaves), truth, any_subject.tolerance)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_checkpoint(any_subject, use_reentrant):
    leaves = any_subject.leaves
    truth = gradients(with_seed(any_subject), leaves)
    # What is reentrant differentiates inputs, and parameters on the way.
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in any_subject.inputs]
    if use_reentrant and not any(x.requires_grad for x in inputs):
        pytest.skip("a reentrant checkpoint needs an input that wants a gradient")
    before = filled(leaves)
    out = with_seed(lambda: checkpoint(any_subject.net, *inputs, use_reentrant=use_reentrant))
    backward(out)
    assert all(leaf.grad is g for leaf, g in zip(leaves, before, strict=True))
    assert_same(before, plus(truth), any_subject.tolerance)


def test_a_change_in_place_between_forward_and_backward_is_refused(subject):
    """Or has nothing to do with what backward needs, and then the gradients are right."""
    truth, leaves, refused = subject.true_gradients(), subject.leaves, 0
    for leaf in leaves:
        out, before = subject(), leaf.detach().clone()
        with torch.no_grad():
            leaf.mul_(2)
        found = result_or_message(lambda out=out: gradients(out, leaves))
        with torch.no_grad():
            leaf.copy_(before)
        if isinstance(found, str):
            refused += 1
            assert IN_PLACE in found
        else:
            assert_same(found, truth, subject.tolerance)
    # A scalar loss has made its gradients in the forward pass, and needs nothing more.
    assert refused or subject.net.__class__.__name__ == "Head"


def test_the_random_state_is_forwards_alone(any_subject):
    """Draws between the passes change no gradient, and backward makes none."""
    leaves = any_subject.leaves
    truth = gradients(with_seed(any_subject), leaves)
    out = with_seed(any_subject)
    torch.manual_seed(5)
    torch.rand(7)
    state = torch.get_rng_state()
    found = gradients(out, leaves)
    assert torch.get_rng_state().equal(state)
    assert_same(found, truth, any_subject.tolerance)


def test_each_forward_draws_anew_and_follows_the_seed(any_subject):
    if not any_subject.drops:
        state = torch.get_rng_state()
        any_subject()
        assert torch.get_rng_state().equal(state), "nothing to draw"
        return
    assert with_seed(any_subject).equal(with_seed(any_subject))
    assert not any_subject().equal(any_subject())


# Of these autograd computes products itself, in the precision that it finds in backward.
AUTOGRADS_OWN = ("function, naive", "bias, naive", "log-sum-exp", "attention, naive", "function, naive, dropping")
WITH_LAYERS_OF_AUTOGRADS = (
    *("attention", "attention, memory-efficient", "flash attention", "flash attention, dropping", "cosine"),
    *("feed-forward", "norm before", "transformer, logits in pieces"),
)


@pytest.mark.parametrize("autocast", [True, False], ids=["forward inside", "forward outside"])
@pytest.mark.parametrize("name", [name for name in EVERYTHING if name not in AUTOGRADS_OWN])
def test_precision_is_forwards_wherever_backward_runs(name, autocast):
    if not autocast and name in WITH_LAYERS_OF_AUTOGRADS:
        pytest.skip("nn.Linear itself takes backward's autocast")
    subject = EVERYTHING[name]()
    subject.dtype = torch.float32
    subject.__post_init__()

    def run(back):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = with_seed(subject)
        with torch.autocast("cpu", torch.bfloat16, enabled=back):
            return [out, *gradients(out, subject.leaves)]

    assert_same(run(True), run(False), 0.0)
