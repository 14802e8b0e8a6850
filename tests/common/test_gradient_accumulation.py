"""A weight's gradient is added to the ``.grad`` that is there, whoever makes it, and is right in the end."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from memory_efficient_attention_pytorch import (
    Attention,
    FeedForward,
    ReversibleSequence,
    linear_cross_entropy,
)
from memory_efficient_attention_pytorch.common import gradients as differentiation
from memory_efficient_attention_pytorch.loss.function import gradients_wait
from memory_efficient_attention_pytorch.loss.reversible import normed_sum
from tests.accumulating import (
    MAKERS,
    TOLERANCE,
    FreshTotals,
    Head,
    Language,
    by_hand,
    inputs,
    loss_of,
    matrices,
)
from tests.agreement import assert_same, filled


@pytest.mark.parametrize("kind", MAKERS)
def test_it_is_the_same_tensor_with_the_sum_in_it(kind):
    net, batches = MAKERS[kind](), inputs()
    before = filled(net.parameters(), 0.5)
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
    filled(net.parameters(), 0.0)
    loss_of(net, x).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), first, strict=True))


# One leaf, several passes.


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


def test_a_device_is_handed_zeros_without_memory():
    leaf = nn.Parameter(torch.empty(30, 20, device="meta"))
    leaf.grad = torch.empty_like(leaf)
    nothing = differentiation.left_to_add(leaf, leaf.grad)
    assert nothing.shape == leaf.shape
    assert nothing.untyped_storage().nbytes() == leaf.element_size()


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


def test_inside_pieces_of_another_branch():
    """The outer pass differentiates the inner one by torch.autograd.grad, piece by piece, and sums by itself."""
    outer = FeedForward(24, 4, chunks=2)
    outer.net = nn.Sequential(FeedForward(24, 2, chunks=3), nn.Tanh(), nn.Linear(24, 24))
    batches = inputs()
    truth = by_hand(outer, batches, 0.5)
    filled(outer.parameters(), 0.5)
    for x in batches:
        loss_of(outer, x).backward()
    assert_same([p.grad for p in outer.parameters()], truth, TOLERANCE)


def test_a_pass_that_fails_midway_loses_nothing_of_the_ones_before():
    net, (x,) = FeedForward(24, 4, chunks=4), inputs(1, requires_grad=True)
    before = filled(net.parameters(), 0.5)

    def fail(gradient):
        raise KeyError("midway")

    handle = x.register_hook(fail)
    with pytest.raises(KeyError, match="midway"):
        loss_of(net, x).backward()
    handle.remove()
    assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
    truth = by_hand(net, [x], 0.5)
    filled(net.parameters(), 0.5)
    loss_of(net, x).backward()
    assert_same([p.grad for p in net.parameters()], truth, TOLERANCE)


def test_tensors_kept_elsewhere():
    net, (x,) = Head(), inputs(1)
    truth = by_hand(net, [x], 0.5)
    filled(net.parameters(), 0.5)
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


def test_products_in_fp16_do_not_wait():
    """They would be rounded after a loss scaler's factor, which may be too large for them."""
    head, hidden = Head(), torch.randn(64, 24)
    filled(head.parameters(), 0.5)
    for dtype, waits in ((torch.float32, True), (torch.bfloat16, True), (torch.float16, False)):
        assert gradients_wait(dtype, hidden.shape, head.weight) == waits


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


@pytest.mark.parametrize("exact", [True, False])
def test_waiting_gradients_of_a_model_under_autocast(exact):
    """The mean's count is split into its mantissa and a power of two, so that bf16 rounds both ways alike."""
    net, (x,) = Language(exact=exact), inputs(1)
    found = []
    for there in (False, True):
        if there:
            filled(net.parameters(), 0.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, x)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1], found[0], 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_comes_before_the_logits_is_repeated_as_it_was(autocast):
    """The same dropout and the same precision, wherever backward runs."""
    norm = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.Dropout(0.5))
    net, head, (x,) = ReversibleSequence([(nn.Linear(24, 24), nn.Linear(24, 24))]), Head(), inputs(1)
    labels, modules = torch.randint(257, (2, 20)), nn.ModuleList([net, norm, head])
    found = []
    for there in (False, True):
        if there:
            filled(modules.parameters(), 0.0)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rows = normed_sum(norm, *net.streams(x))
            loss = linear_cross_entropy(rows, head.weight, labels, bias=head.bias, chunk_size=7)
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        found.append([loss.detach(), *(p.grad.clone() for p in modules.parameters())])
    assert torch.equal(found[0][0], found[1][0])
    assert_same(found[1], found[0], 1e-6)


# Others who have a say in gradients.


def test_a_loss_scaler():
    net, batches = Language(), inputs()
    truth = by_hand(net, batches)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    filled(net.parameters(), 0.0)
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
