"""Inputs of checkpoints wait on the host: gradients are those of a plain checkpoint, however late copies are made."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch.recompute.host_inputs import InputsOnHost, Lane


class LateLane(Lane):
    """For tensors on the host: a copy is made when it is waited for, if its source is still there."""

    queue: list = []  # noqa: RUF012
    sources: list = []  # noqa: RUF012
    targets: list = []  # noqa: RUF012
    abandoned: list = []  # noqa: RUF012

    def __init__(self, device):
        self.device, self.pinned = device, False

    @staticmethod
    def serves(tensor):
        return tensor.is_floating_point()

    def copy(self, target, source):
        target.data.fill_(float("nan"))  # .data: as if it had been made at once, by versions
        self.queue.append((weakref.ref(target), weakref.ref(source)))
        self.sources.append(weakref.ref(source))
        self.targets.append(weakref.ref(target))
        return len(self.queue)

    def wait(self, copied):
        for number, pair in enumerate(self.queue[:copied]):
            if pair is not None:
                target, source = (ref() for ref in pair)
                if target is not None:
                    assert source is not None, "the source was let go before it was copied"
                    target.data.copy_(source)
                self.queue[number] = None

    def abandon(self, tensor):
        self.abandoned.append(tensor.shape)


@pytest.fixture
def late():
    LateLane.queue, LateLane.sources, LateLane.targets, LateLane.abandoned = [], [], [], []
    return InputsOnHost(checkpoint, LateLane)


DEPTH = 5


def layers():
    torch.manual_seed(0)
    return torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(DEPTH))


def stacked(run, x, kind, seen=lambda: None):
    """A few layers; run(function, *inputs) is the checkpoint."""
    found, made = x, layers()
    for layer in made:
        if kind == "nested":

            def function(a, layer=layer):
                return a + run(lambda b: layer(b).tanh() * b, a.sin(), use_reentrant=False)

            found = run(function, found, use_reentrant=False)
        elif kind == "shared":
            found = run(lambda a, b, layer=layer: layer(a).tanh() * b, found, x, use_reentrant=False)
        elif kind == "strides":
            found = run(lambda a, layer=layer: layer(a.mT).tanh().mT, found.mT.contiguous().mT, use_reentrant=False)
            found = run(lambda a, b: a * b.sum(), found, x[:1, :, :4:2].expand(3, -1, -1), use_reentrant=False)
        else:
            found = run(lambda a, layer=layer: layer(a).tanh(), found, use_reentrant=False)
        seen()
    return found, made


def gradients(run, kind, backward):
    torch.manual_seed(1)
    x = torch.randn(3, 8, 8, requires_grad=True)
    out, made = stacked(run, x, kind)
    return backward(out, [x, *made.parameters()])


def once(out, inputs):
    return torch.autograd.grad(out.square().sum(), inputs)


def twice(out, inputs):
    first = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
    return first + torch.autograd.grad(out.sin().sum(), inputs)


def of_the_last_alone_first(out, inputs):
    return torch.autograd.grad(out.sum(), inputs[-1:], retain_graph=True) + once(out, inputs)


@pytest.mark.parametrize("backward", [once, twice, of_the_last_alone_first])
@pytest.mark.parametrize("kind", ["plain", "nested", "shared", "strides"])
def test_gradients_are_those_of_a_plain_checkpoint(late, kind, backward):
    found, expected = gradients(late, kind, backward), gradients(checkpoint, kind, backward)
    assert len(LateLane.queue) > DEPTH
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_several_forward_passes_before_their_backward_passes(late):
    def both(run):
        torch.manual_seed(2)
        inputs = [torch.randn(2, 8, requires_grad=True) for _ in range(2)]
        outs = [stacked(run, x, "plain")[0] for x in inputs]
        return [torch.autograd.grad(out.square().sum(), x)[0] for out, x in zip(outs, inputs, strict=True)]

    assert all(torch.equal(a, b) for a, b in zip(both(late), both(checkpoint), strict=True))


def test_an_input_leaves_when_the_next_one_comes_and_comes_back_one_call_ahead(late):
    def on_device():
        return sum(ref() is not None for ref in LateLane.sources[:DEPTH])

    x = torch.randn(3, 8, 8, requires_grad=True)
    out, _ = stacked(late, x, "plain", seen=lambda: on_device() <= 2 or pytest.fail("inputs stay"))
    assert len(LateLane.queue) == DEPTH
    out.sum().backward()
    # The last one is still there, and all others are copied once.
    assert len(LateLane.queue) == 2 * DEPTH - 1
    assert LateLane.queue == [None] * (2 * DEPTH - 1)


def test_what_came_back_for_a_backward_pass_that_ended_early_leaves_with_the_next(late):
    outs = [stacked(late, torch.randn(2, 8, requires_grad=True), "plain") for _ in range(2)]
    (early, made), (other, _) = outs
    torch.autograd.grad(early.sum(), made[-1].weight, retain_graph=True)
    ahead = LateLane.targets[-1]
    assert ahead() is not None
    other.sum().backward()
    assert ahead() is None


def test_an_input_that_is_changed_while_it_is_copied_is_an_error(late):
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(2, 8, requires_grad=True).clone()
    out = late(layer, x, use_reentrant=False)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late(layer, out, use_reentrant=False)


def test_what_lies_on_the_host_is_not_copied():
    run = InputsOnHost(checkpoint)
    x = torch.randn(2, 8, requires_grad=True)
    out = run(torch.sin, x, use_reentrant=False)
    assert not run.lanes
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], x.detach().cos())


def test_a_copy_has_inputs_of_its_own(late):
    late(torch.sin, torch.randn(2, requires_grad=True), use_reentrant=False)
    other = copy.deepcopy(late)
    assert (other.checkpoint, other.lane, other.lanes) == (checkpoint, LateLane, {})


def test_memory_is_free_as_soon_as_the_computing_stream_has_waited(late):
    """The allocator is asked to watch a copy only where nobody waited for it."""
    x = torch.randn(4, 8, requires_grad=True)
    stacked(late, x, "plain")[0].sum().backward()
    assert LateLane.abandoned == []
    stacked(late, x, "plain")  # of the last layer, what is dropped with it
    gc.collect()
    assert LateLane.abandoned
