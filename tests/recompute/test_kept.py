"""Results kept of a forward pass: handed out in the repetition, call by call, whoever it was that asked."""

import weakref

import pytest
import torch

from memory_efficient_attention_pytorch.recompute.kept import KeptResults


class Owner:
    """Counts how often it computes."""

    def __init__(self, name):
        self.name, self.computed = name, 0

    def __call__(self, **kwargs):
        return KeptResults.active().fetch(self, self.compute, **kwargs)

    def compute(self):
        self.computed += 1
        return self.name, (torch.full((2,), float(self.computed)), torch.arange(3))


def forward(kept, *owners):
    with kept.keeping():
        return [owner() for owner in owners]


def test_the_repetition_gets_what_the_forward_pass_computed():
    kept, a, b = KeptResults(), Owner("a"), Owner("b")
    found = forward(kept, a, b, a)
    tensors = kept.release()
    assert len(tensors) == 6
    assert kept.release() == (), "they are the caller's"
    for _ in range(2):
        with kept.repeating(tensors):
            again = [owner() for owner in (a, b, a)]
        for (name, ours), (other, truth) in zip(again, found, strict=True):
            assert name == other
            assert all(x is y for x, y in zip(ours, truth, strict=True))
    assert (a.computed, b.computed) == (2, 1)
    assert KeptResults.active() is None


@pytest.mark.parametrize(("before", "wrong"), [("", "b"), ("a", "a"), ("ab", "a")])
def test_another_order_is_refused(before, wrong):
    kept = KeptResults()
    owners = {name: Owner(name) for name in "ab"}
    forward(kept, owners["a"], owners["b"])
    with kept.repeating(kept.release()):
        for name in before:
            owners[name]()
        with pytest.raises(ValueError, match="slow_things: expected Owner to be called in backward as in forward"):
            owners[wrong](option="slow_things")


def test_an_inner_pass_takes_what_the_outer_one_has():
    """A checkpoint around a piecewise module: the module's forward runs again inside the outer repetition."""
    outer, a = KeptResults(), Owner("a")
    inner = KeptResults()
    with outer.keeping():
        forward(inner, a)
    tensors, again = outer.release(), KeptResults()
    with outer.repeating(tensors):
        forward(again, a)
    assert a.computed == 1
    with again.repeating(again.release()):
        a()
    assert a.computed == 1
    assert inner.release()[0] is tensors[0]


def test_an_error_of_the_outer_pass_names_the_option_too():
    outer, a, b = KeptResults(), Owner("a"), Owner("b")
    with outer.keeping():
        forward(KeptResults(), a)
    wrong = pytest.raises(ValueError, match="slow_things: expected Owner")
    with outer.repeating(outer.release()), KeptResults().keeping(), wrong:
        b(option="slow_things")


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
