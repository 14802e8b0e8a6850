"""Sums of gradients: one is kept as it comes, several are added in fp32, or in the leaf's own .grad."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch.common.gradients import GradientSums, fresh_total


def leaves(dtype=torch.float32):
    return [nn.Parameter(torch.randn(4, 3).to(dtype)) for _ in range(3)]


def test_nothing_came():
    a, b, c = leaves()
    sums = GradientSums([a, b, c], [True, False, True])
    assert sums.wanted == [a, c]
    assert sums.results == [None, None, None]


def test_one_that_comes_alone_is_kept_as_it_is():
    a, b, c = leaves()
    sums, grad, cotangent = GradientSums([a, b, c], [True, True, True]), torch.randn(4, 3), torch.randn(8, 3)
    sums.add(a, grad)
    sums.add(b, cotangent[:4], beside=cotangent)
    assert sums.results[0] is grad
    assert sums.results[1].equal(cotangent[:4])
    assert sums.results[1].data_ptr() != cotangent.data_ptr(), "not the caller's memory"
    assert sums.results[2] is None


@pytest.mark.parametrize("first", ["whole", "part", "product"])
def test_whole_ones_parts_and_products_in_any_order(first):
    a, b, _ = leaves()
    sums, whole, part = GradientSums([a, b], [True, True]), torch.randn(4, 3), torch.randn(2, 3)
    upstream, values = torch.randn(5, 4), torch.randn(5, 3)
    expected = 2 * whole + upstream.t() @ values
    expected[1:3] += part
    steps = {
        "whole": lambda: [sums.add(a, whole), sums.add(a, whole)],
        "part": lambda: sums.add(a, part, slice(1, 3)),
        "product": lambda: sums.add_product(a, upstream, values),
    }
    kept = whole.clone()
    for name in sorted(steps, key=lambda name: name != first):
        steps[name]()
    torch.testing.assert_close(sums.results[0], expected)
    assert whole.equal(kept), "what came first belongs to whoever made it"
    assert sums.results[1] is None


def test_many_in_low_precision_are_added_in_fp32():
    (a, _, _), small = leaves(torch.bfloat16), torch.full((4, 3), 2.0**-9, dtype=torch.bfloat16)
    sums = GradientSums([a], [True])
    sums.add(a, torch.ones_like(small))
    for _ in range(256):
        sums.add(a, small)
    assert sums.results[0].dtype == torch.bfloat16
    assert sums.results[0].eq(1.5).all(), "in bf16 it would still be 1"


def test_gradients_that_nobody_wants_are_dropped():
    a, b, c = leaves()
    sums = GradientSums([a, b], [True, False])
    for leaf in (b, c):
        sums.add(leaf, torch.randn(4, 3))
        sums.add_product(leaf, torch.randn(5, 4), torch.randn(5, 3))
        assert sums.total(leaf) is None
    assert sums.results == [None, None]


def test_backward_adds_the_leaves_and_returns_the_inputs():
    a, b, c = leaves()
    x = torch.randn(4, 3, requires_grad=True)
    sums, cotangent = GradientSums([a, b, c], [True, False, True]), torch.randn(4, 3)
    for _ in range(2):
        (of_x,) = sums.backward(a * x + b, cotangent, [x])
    assert of_x.equal(a * cotangent)
    torch.testing.assert_close(sums.results[0], 2 * x.detach() * cotangent)
    assert sums.results[1:] == [None, None], "one that is not wanted, one that took no part"
    assert sums.backward(x.detach(), cotangent, [x]) == [None], "a value that nothing can be asked of"


def test_outside_of_a_backward_pass_grad_is_left_alone():
    a, *_ = leaves()
    a.grad = torch.ones(4, 3)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, total):
            sums = GradientSums([a], [True], total) if total else GradientSums([a], [True])
            sums.add(a, torch.ones(4, 3), slice(None))
            assert sums.results[0].equal(torch.ones(4, 3))
            return a.clone()

        @staticmethod
        def backward(ctx, cotangent):
            # A forward pass that is repeated in backward: .grad is about to be added to, but not by it.
            sums = GradientSums([a], [True], fresh_total)
            sums.add(a, torch.ones(4, 3), slice(None))
            assert a.grad.equal(torch.ones(4, 3))
            return cotangent, None

    Forward.apply(a, None).sum().backward()
    assert a.grad.equal(torch.full((4, 3), 2.0))
