"""A weight's gradient is added to the ``.grad`` that is there, whoever makes it, but only where nobody could tell."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch import (
    Attention,
    FeedForward,
    Transformer,
    differentiation,
    linear_cross_entropy,
)
from memory_efficient_attention_pytorch.functional import products
from memory_efficient_attention_pytorch.linear import Linear
from tests.agreement import assert_same, one_thread

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

TOLERANCE = 2e-5
LANGUAGE = {"num_tokens": 257, "max_seq_len": 64, "dim": 24, "depth": 2, "heads": 4, "dim_head": 8, "causal": True}


class FreshTotals(TorchDispatchMode):
    """The shapes of zeros made to gather a gradient in."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.zeros_like.default:
            self.shapes.append(out.shape)
        return out


class Head(nn.Module):
    """The loss with its weight, of a vocabulary that outnumbers the tokens."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction
        self.weight, self.bias = nn.Parameter(torch.randn(257, 24) / 5), nn.Parameter(torch.randn(257))

    def forward(self, x):
        labels = torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 257
        labels[0, :3] = -100
        options = {"bias": self.bias, "reduction": self.reduction, "chunk_size": 7}
        return linear_cross_entropy(x, self.weight, labels, **options)


class Language(nn.Module):
    """A Transformer with its loss, for inputs that choose the tokens."""

    def __init__(self, **kwargs):
        super().__init__()
        self.net = Transformer(**LANGUAGE, head_chunks=2, ff_chunks=4, **kwargs)

    def forward(self, x):
        tokens = x.detach().sum(-1).abs().mul(1000).long() % 257
        return self.net(tokens, labels=tokens.roll(-1, 1))


MAKERS = {
    "feed-forward": lambda: FeedForward(24, 4, chunks=4),
    "attention": lambda: Attention(dim=24, heads=4, kv_heads=2, dim_head=8, head_chunks=2, causal=True),
    "loss": Head,
    "losses": lambda: Head("none"),
    "language model": Language,
    "reversible no more": lambda: Language(reversible=False),
    "exact": lambda: Language(exact=True),
}


def inputs(count=2, **kwargs):
    return [torch.randn(2, 20, 24, **kwargs) for _ in range(count)]


def loss_of(net, x):
    out = net(x)
    return out if out.dim() == 0 else (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


def by_hand(net, batches, start=0.0, loss=loss_of):
    """Every parameter's gradient summed over the batches, each found on its own."""
    leaves = [p for p in net.parameters() if p.requires_grad]
    total = [torch.full_like(p, start) for p in leaves]
    for x in batches:
        found = torch.autograd.grad(loss(net, x), leaves, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
    return total


def filled(net, value):
    for p in net.parameters():
        p.grad = torch.full_like(p, value)
    return [p.grad for p in net.parameters()]


def matrices(net):
    """Shapes of the weights whose gradients our own backward passes gather."""
    return {p.shape for n, p in net.named_parameters() if p.dim() == 2 and "emb" not in n}


@pytest.mark.parametrize("kind", MAKERS)
def test_it_is_the_same_tensor_with_the_sum_in_it(kind):
    net, batches = MAKERS[kind](), inputs()
    before = filled(net, 0.5)
    places = [g.data_ptr() for g in before]
    with FreshTotals() as fresh:
        for x in batches:
            loss_of(net, x).backward()
    assert not matrices(net) & set(fresh.shapes)
    assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
    assert [p.grad.data_ptr() for p in net.parameters()] == places
    assert_same([p.grad for p in net.parameters()], by_hand(net, batches, 0.5), TOLERANCE)


@pytest.mark.parametrize("kind", ["feed-forward", "attention", "losses"])
def test_zeros_change_nothing(kind):
    """Adding to a gradient of zeros is what is done without any: the same products in the same order."""
    net, (x,) = MAKERS[kind](), inputs(1)
    loss_of(net, x).backward()
    first = [p.grad.clone() for p in net.parameters()]
    filled(net, 0.0)
    loss_of(net, x).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), first, strict=True))


def test_linear_layers_through_onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    net, batches = Linear(512, 640), [torch.randn(256, 512) for _ in range(2)]
    truth = [0.5 + sum(g) for g in zip(*(by_hand(net, [x]) for x in batches), strict=True)]
    weight, bias = filled(net, 0.5)
    with FreshTotals() as fresh:
        for x in batches:
            loss_of(net, x).backward()
    assert not fresh.shapes
    assert net.weight.grad is weight
    assert_same([weight, bias], truth, TOLERANCE)


# Where somebody could tell, the gradient is made apart, as it always was.


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


# One leaf, several passes.


@pytest.mark.parametrize("kind", MAKERS)
def test_a_graph_that_is_kept(kind):
    net, (x,) = MAKERS[kind](), inputs(1)
    truth = by_hand(net, [x, x], 0.5)
    filled(net, 0.5)
    loss = loss_of(net, x)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same([p.grad for p in net.parameters()], truth, TOLERANCE)


def test_a_gradient_that_comes_or_goes_between_forward_and_backward():
    net, (x,) = Head(), inputs(1)
    alone = by_hand(net, [x])
    filled(net, 0.5)
    loss = loss_of(net, x)
    net.zero_grad()
    loss.backward()
    assert_same([p.grad for p in net.parameters()], alone, TOLERANCE)
    net.zero_grad()
    loss = loss_of(net, x)
    filled(net, 0.5)
    loss.backward()
    assert_same([p.grad for p in net.parameters()], [0.5 + g for g in alone], TOLERANCE)


class Tied(nn.Module):
    """Every weight is used twice, and the loss's is the embedding too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.net = nn.Embedding(257, 24), FeedForward(24, 4, chunks=4)
        self.attention = Attention(dim=24, heads=4, dim_head=8, head_chunks=2)

    def forward(self, x):
        tokens = x.detach().sum(-1).abs().mul(1000).long() % 257
        hidden = self.embedding(tokens)
        for _ in range(2):
            hidden = self.attention(hidden + self.net(hidden))
        loss = linear_cross_entropy(hidden, self.embedding.weight, tokens, chunk_size=7)
        return loss + linear_cross_entropy(hidden, self.embedding.weight, tokens.roll(1, 1), chunk_size=5)


@pytest.fixture(params=["cpu", "device"])
def kind_of_nothing(request, monkeypatch):
    """What is handed to the engine once all is added: on a device it is zeros, here on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(differentiation, "_nothing", lambda leaf: leaf.new_zeros(()).expand_as(leaf))


@pytest.mark.usefixtures("kind_of_nothing")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("make", [Tied, lambda: Language(tie_embeddings=True)], ids=["by hand", "Transformer"])
def test_shared_weights_and_gradients_that_are_views_of_one_buffer(make, hooked):
    """Whoever holds the buffer finds the sums in it, after any number of passes."""
    net, batches = make(), inputs(3)
    truth = by_hand(net, batches)
    buffer = torch.zeros(sum(p.numel() for p in net.parameters()))
    parts = buffer.split([p.numel() for p in net.parameters()])
    calls = []
    for p, part in zip(net.parameters(), parts, strict=True):
        p.grad = part.view_as(p)
        if hooked:
            p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    for x in batches:
        loss_of(net, x).backward()
    assert_same([part.view_as(p) for p, part in zip(net.parameters(), parts, strict=True)], truth, TOLERANCE)
    assert all(p.grad.data_ptr() == part.data_ptr() for p, part in zip(net.parameters(), parts, strict=True))
    assert len(calls) == hooked * 3 * len(parts)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["feed-forward", "attention", "loss", "losses"])
def test_inside_a_checkpoint(kind, use_reentrant):
    net, batches = MAKERS[kind](), inputs(requires_grad=True)
    truth = by_hand(net, batches, 0.5)
    before = filled(net, 0.5)
    for x in batches:
        loss_of(lambda x: checkpoint(net, x, use_reentrant=use_reentrant), x).backward()
    assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
    assert_same(before, truth, TOLERANCE)


def test_inside_pieces_of_another_branch():
    """The outer pass differentiates the inner one by torch.autograd.grad, piece by piece, and sums by itself."""
    outer = FeedForward(24, 4, chunks=2)
    outer.net = nn.Sequential(FeedForward(24, 2, chunks=3), nn.Tanh(), nn.Linear(24, 24))
    batches = inputs()
    truth = by_hand(outer, batches, 0.5)
    filled(outer, 0.5)
    for x in batches:
        loss_of(outer, x).backward()
    assert_same([p.grad for p in outer.parameters()], truth, TOLERANCE)


def test_a_pass_that_fails_midway_loses_nothing_of_the_ones_before():
    net, (x,) = FeedForward(24, 4, chunks=4), inputs(1, requires_grad=True)
    before = filled(net, 0.5)

    def fail(gradient):
        raise KeyError("midway")

    handle = x.register_hook(fail)
    with pytest.raises(KeyError, match="midway"):
        loss_of(net, x).backward()
    handle.remove()
    assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
    truth = by_hand(net, [x], 0.5)
    filled(net, 0.5)
    loss_of(net, x).backward()
    assert_same([p.grad for p in net.parameters()], truth, TOLERANCE)


def test_tensors_kept_elsewhere():
    net, (x,) = Head(), inputs(1)
    truth = by_hand(net, [x], 0.5)
    filled(net, 0.5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        loss = loss_of(net, x)
    loss.backward()
    assert_same([p.grad for p in net.parameters()], truth, TOLERANCE)


# The loss, whose gradients wait for backward.


@pytest.mark.parametrize(("vocabulary", "forward", "backward"), [(64, 3, 0), (65, 1, 3)])
def test_a_weight_larger_than_the_hidden_vectors_waits(vocabulary, forward, backward):
    """Three products where the gradients are made in forward, four where they wait; only with a gradient there."""
    hidden, labels = torch.randn(64, 24, requires_grad=True), torch.randint(vocabulary, (64,))
    weight = nn.Parameter(torch.randn(vocabulary, 24))

    def counts():
        found = []
        with Products() as count:
            loss = linear_cross_entropy(hidden, weight, labels, chunk_size=64)
        found.append(count.calls)
        with Products() as count:
            loss.backward()
        return (*found, count.calls)

    assert counts() == (3, 0)
    assert counts() == (forward, backward)
    weight.register_hook(lambda g: None)
    assert counts() == (3, 0)


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket.__name__ in ("mm", "addmm_", "addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_waiting_gradients_are_as_good_as_those_made_in_forward(reduction, smoothing, autocast):
    """Against fp64, with a loss scaler's factor."""
    scale = 2.0**10
    hidden, labels = torch.randn(40, 24), torch.randint(257, (40,))
    labels[::5] = -100
    weight, bias = torch.randn(257, 24) / 5, torch.randn(257)
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def outcome(function, dtype, start, **more):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        for leaf in leaves[1:]:
            leaf.grad = None if start is None else torch.full_like(leaf, start)
        with torch.autocast("cpu", autocast, enabled=autocast is not None and dtype == torch.float32):
            loss = function(leaves[0], leaves[1], labels, bias=leaves[2], **options, **more)
        (scale * loss).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def plain(hidden, weight, labels, *, bias, **options):
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, **options)

    truth = outcome(plain, torch.float64, None)
    early = outcome(linear_cross_entropy, torch.float32, None, chunk_size=16)
    late = outcome(linear_cross_entropy, torch.float32, 0.0, chunk_size=16)
    assert torch.equal(late[0], early[0])
    for ours, first, true in zip(late[1:], early[1:], truth[1:], strict=True):
        allowed = (first - true).abs().max() + 1e-6 * true.abs().max()
        assert (ours - true).abs().max() <= 1.5 * allowed


# Others who have a say in gradients.


def test_a_loss_scaler():
    net, batches = Language(), inputs()
    truth = by_hand(net, batches)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    filled(net, 0.0)
    for x in batches:
        scaler.scale(loss_of(net, x)).backward()
    scaler.step(optimizer)
    assert_same([(b - p.detach()) / 0.1 for b, p in zip(before, net.parameters(), strict=True)], truth, 1e-3)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"tie_embeddings": True}], ids=str)
def test_distributed_data_parallel(kwargs, views, set_to_none):
    """Two steps of three batches each, of which only the last is synchronised."""
    net, batches = Language(**kwargs), inputs(6)
    parallel = DistributedDataParallel(net, gradient_as_bucket_view=views)
    for step in range(2):
        net.zero_grad(set_to_none=set_to_none)
        first, second, last = batches[3 * step : 3 * step + 3]
        with parallel.no_sync():
            loss_of(parallel, first).backward()
            loss_of(parallel, second).backward()
        kept = [p.grad for p in net.parameters()]
        loss_of(parallel, last).backward()
        truth = by_hand(net, [first, second, last])
        assert_same([p.grad for p in net.parameters()], truth, TOLERANCE)
        if step and views and not set_to_none:
            assert all(p.grad is g for p, g in zip(net.parameters(), kept, strict=True))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kwargs", [{}, {"tie_embeddings": True}], ids=str)
def test_fully_sharded(kwargs):
    net, batches = Language(**kwargs), inputs(3)
    truth = by_hand(net, batches)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in net.net.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    for number, x in enumerate(batches):
        net.set_requires_gradient_sync(number == 2)
        loss_of(net, x).backward()
    assert_same([p.grad.full_tensor() for p in net.parameters()], truth, TOLERANCE)
