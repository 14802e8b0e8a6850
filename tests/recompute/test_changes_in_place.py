"""Branches that change something as they go: their buffers, and the stream that they are given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from memory_efficient_attention_pytorch import Chunked, FeedForward, PreNorm, ReversibleSequence
from tests.agreement import assert_same, gradients
from tests.branches import DIM, tokens


class Norms(nn.Module):
    """Batch normalisation over all tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.out(self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class LargeState(nn.Module):
    """A buffer too large to be kept in any case, of which one element changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.ones(2**17))

    def forward(self, x):
        self.state[0] *= 1.5
        return torch.tanh(x * self.state[0].clone())


class Instances(nn.InstanceNorm1d):
    """Its running statistics are all that it tells of a change."""

    def __init__(self):
        super().__init__(6, affine=True, track_running_stats=True)


class Counts(nn.Module):
    """What it computes depends on a buffer, which it replaces at each call; another module has the same buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.register_buffer("calls", torch.ones(()))
        self.inner.register_buffer("calls", self.calls)

    def forward(self, x):
        self.calls = self.calls + 1
        self.inner.calls.mul_(2)
        return torch.tanh(self.inner(x) / (self.calls * self.inner.calls))


def spectral(decorate=spectral_norm):
    return nn.Sequential(decorate(nn.Linear(DIM, DIM)), nn.Tanh())


def in_feed_forward():
    feed = FeedForward(DIM, 2, chunks=1)
    spectral_norm(feed.net[0])
    return PreNorm(DIM, feed)


CHANGING = {
    "batch norm": Norms,
    "spectral norm": spectral,
    "spectral norm by hooks": lambda: spectral(nn.utils.spectral_norm),
    "replaced buffer": Counts,
    "large buffer": LargeState,
    "instance norm": Instances,
    "within a feed-forward": in_feed_forward,
    "normed": lambda: PreNorm(DIM, spectral()),
}


def network(kind, reversible=True, exact=False):
    torch.manual_seed(0)
    blocks = [(CHANGING[kind](), CHANGING[kind]()) for _ in range(2)]
    return ReversibleSequence(blocks, reversible=reversible, exact=exact).double()


def steps(net, x, losses=2, evaluated=False):
    """Gradients of several passes made before the first backward, and the buffers after it all."""
    net.train(not evaluated)
    wanted = (x, *net.parameters())
    outs = [net(x * (i + 1)) for i in range(losses)]
    found = [(out, *gradients(out, wanted)) for out in outs]
    return [t for of_one in found for t in of_one], [buffer.clone() for buffer in net.buffers()]


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("kind", CHANGING)
def test_the_repetition_starts_where_forward_started_and_leaves_no_trace(kind, evaluated):
    x, found = tokens(4, 6, DIM, dtype=torch.float64), []
    for reversible in (True, False):
        # Several stored passes before a backward are not for a module that replaces what autograd keeps.
        for_all, buffers = steps(network(kind, reversible), x, 2 if reversible else 1, evaluated)
        found.append((for_all, buffers))
    stored = network(kind, reversible=False)
    truth = []
    for i in range(2):
        one, _ = steps(stored, x * (i + 1), 1, evaluated)
        truth += [one[0], one[1] * (i + 1), *one[2:]]
    # x itself is doubled in the second pass.
    assert_same(found[0][0], truth, 1e-9)
    assert_same(found[0][1], [buffer.clone() for buffer in stored.buffers()], 1e-12)


@pytest.mark.parametrize("make", [lambda net: Chunked(net, chunks=1), lambda net: Chunked(net, chunks=3)])
def test_in_chunks_too(make):
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Linear(DIM, DIM)), nn.Tanh()).double()
    x, reference = tokens(2, 6, DIM, dtype=torch.float64), copy.deepcopy(net)
    ours, wanted = make(net), (x, *net.parameters())
    parts = x.chunk(ours.chunks, 1)
    truth = torch.cat([reference(part) for part in parts], 1)
    out = ours(x)
    assert_same((out, *gradients(out, wanted)), (truth, *gradients(truth, (x, *reference.parameters()))), 1e-9)
    assert_same(list(net.buffers()), list(reference.buffers()), 0.0)


def test_buffers_lent_for_a_call_are_what_its_repetition_sees():
    net, stored = network("batch norm").eval(), network("batch norm", reversible=False).eval()
    x, found = tokens(4, 6, DIM, dtype=torch.float64), []
    for ours in (net, stored):
        own = {name: buffer.clone() for name, buffer in ours.named_buffers()}
        lent = {name: buffer + 1.5 for name, buffer in own.items() if buffer.is_floating_point()}
        out = functional_call(ours, lent, (x,))
        found.append((out, *gradients(out, (x, *ours.parameters()))))
        assert all(torch.equal(own[name], buffer) for name, buffer in ours.named_buffers())
    assert_same(*found, 1e-9)


class Said(nn.Module):
    """Works in place and says so."""

    inplace = True

    def forward(self, x):
        return x.mul_(2).sin_()


IN_PLACE = {
    "relu": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, DIM)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.0, inplace=True), nn.Hardtanh(inplace=True), nn.Linear(DIM, DIM)),
    "alone": lambda: nn.SiLU(inplace=True),
    "said": Said,
    "chunked": lambda: Chunked(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, DIM)), chunks=3),
    "normed": lambda: PreNorm(DIM, nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, DIM))),
}


def apart(module):
    """The same without working in place."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, Said):
            part.forward = lambda x: torch.sin(2 * x)
        elif hasattr(part, "inplace"):
            part.inplace = False
    return module


@pytest.mark.parametrize("kwargs", [{}, {"exact": True}, {"reversible": False}], ids=str)
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_branch_whose_first_layer_works_in_place(kind, kwargs):
    torch.manual_seed(0)
    blocks = [(IN_PLACE[kind](), IN_PLACE[kind]()) for _ in range(2)]
    net = ReversibleSequence(blocks, **kwargs).double()
    plain = ReversibleSequence([tuple(map(apart, pair)) for pair in blocks], reversible=False, exact="exact" in kwargs)
    plain.double()
    x = tokens(2, 6, DIM, dtype=torch.float64)
    before = x.detach().clone()
    with torch.no_grad():
        inferred = net(x)
    with torch.inference_mode():
        assert torch.equal(net(x), inferred)
    found = []
    for ours in (net, plain):
        out = ours(x)
        found.append((out, *gradients(out, (x, *ours.parameters()))))
    assert_same(*found, 1e-12)
    assert_same([inferred], [found[1][0]], 1e-12)
    assert torch.equal(x, before)


def test_in_chunks_alone():
    net, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, DIM)), tokens()
    ours, before = Chunked(net, chunks=3), x.detach().clone()
    out, truth = ours(x), apart(net)(x)
    wanted = (x, *net.parameters())
    assert_same((out, *gradients(out, wanted)), (truth, *gradients(net(x.clone()), wanted)), 1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("reversible", [True, False])
def test_one_that_says_nothing_is_refused_in_words(reversible):
    class Silent(nn.Module):
        def forward(self, x):
            return F.relu_(x)

    net = ReversibleSequence([(nn.Linear(DIM, DIM), Silent())], reversible=reversible)
    with pytest.raises(ValueError, match="Silent: expected a branch that leaves its input unchanged"):
        net(tokens())


class Multiplies(nn.Module):
    """By a buffer too large to be kept in any case."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(DIM, 2**17 // DIM))

    def forward(self, x):
        return x * self.table.sum(1)


@pytest.mark.parametrize("around", [lambda net: Chunked(net, chunks=2), lambda net: ReversibleSequence([(net, net)])])
def test_a_large_buffer_that_changes_before_backward_is_told(around):
    """As autograd tells it: it was not copied, and the gradient would be another's."""
    net, x = Multiplies(), torch.randn(2, 6, DIM, requires_grad=True)
    out = around(net)(x)
    net.table.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Constant(nn.Module):
    """A buffer that is a parameter by class: what is not to be trained, but follows the module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.register_buffer("constant", nn.Parameter(torch.ones(DIM), requires_grad=False))

    def forward(self, x):
        return self.inner(x) * self.constant


class Initialises(nn.Module):
    """At its first call, by a hook that removes itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.handle = self.register_forward_pre_hook(self.initialise)

    @staticmethod
    def initialise(module, args):
        module.handle.remove()
        del module.handle

    def forward(self, x):
        return self.inner(x)


def test_a_hook_that_removes_itself_runs_once():
    net = Initialises()
    ReversibleSequence([(net, nn.Identity())])(tokens(2, 6, DIM)).sum().backward()
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("around", [lambda net: Chunked(net, chunks=2), lambda net: ReversibleSequence([(net, net)])])
def test_a_buffer_stays_one(around):
    net = Constant()
    around(net)(torch.randn(2, 6, DIM, requires_grad=True)).sum().backward()
    assert [name for name, _ in net.named_parameters()] == ["inner.weight", "inner.bias"]
    assert [name for name, _ in net.named_buffers()] == ["constant"]


@pytest.mark.parametrize("around", [lambda net: Chunked(net, chunks=1), lambda net: ReversibleSequence([(net, net)])])
def test_a_hook_for_one_pass_is_there_in_its_repetition(around):
    """peft says by such hooks where an adapter applies; its own are gone when backward begins."""
    net, x, found = nn.Linear(DIM, DIM), tokens(2, 6, DIM), []
    for run in (around(net), ReversibleSequence([(net, net)], reversible=False)):
        if isinstance(run, ReversibleSequence) and not isinstance(around(net), ReversibleSequence):
            run = net
        handles = [
            net.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True),
            net.register_forward_hook(lambda module, args, out: out.sin()),
        ]
        out = run(x)
        for handle in handles:
            handle.remove()
        found.append(gradients(out, [x, *net.parameters()]))
        assert not net._forward_hooks
        assert not net._forward_pre_hooks_with_kwargs
    assert_same(*found, 1e-5)
