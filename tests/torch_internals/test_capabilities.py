"""Private parts of PyTorch taken away, one at a time: what serves instead is slower, and as exact."""

import copy
import importlib
import pkgutil

import pytest
import torch

from memory_efficient_attention_pytorch import (
    AlibiBias,
    Attention,
    Chunked,
    FeedForward,
    PreNorm,
    RelativePositionBias,
    ReversibleSequence,
    Transformer,
    dot_product_attention,
    linear_cross_entropy,
    plan,
    torch_internals,
)
from memory_efficient_attention_pytorch.torch_internals import ALL, Capability, operator, taken_away
from tests import reference
from tests.agreement import assert_same
from tests.branches import TokenMLP

for module in pkgutil.iter_modules(torch_internals.__path__):
    importlib.import_module(f"{torch_internals.__name__}.{module.name}")
NAMES = sorted(ALL)


def attention():
    """Outputs and gradients of every backend that takes the request, against the definition in fp64."""
    q, k, v = (torch.randn(2, heads, 70, 16, requires_grad=True) for heads in (4, 2, 2))
    padding = torch.arange(70)[None] >= torch.tensor([[0], [9]])
    requests = (
        {"causal": True},
        {"causal": True, "window": (20, 0), "mask": padding},
        {"attn_bias": RelativePositionBias(4)},
        {"attn_bias": AlibiBias(4), "causal": True},
    )
    for request in requests:
        bias = request.get("attn_bias")
        learned = [] if bias is None else list(bias.parameters())
        exact = copy.deepcopy(bias)
        if exact is not None:
            exact = exact.double()
        truth = reference.attention(q.double(), k.double(), v.double(), **{**request, "attn_bias": exact})
        wanted = [q, k, v, *([] if exact is None else exact.parameters())]
        true_gradients = torch.autograd.grad(truth.sin().sum(), wanted)
        for backend in ("naive", "tiled", "auto"):
            out = dot_product_attention(q, k, v, backend=backend, q_bucket_size=32, k_bucket_size=32, **request)
            reference.assert_close("out", out, truth, 1e-5)
            found = torch.autograd.grad(out.sin().sum(), [q, k, v, *learned])
            for mine, true in zip(found, true_gradients, strict=True):
                reference.assert_close("gradient", mine, true, 1e-5)


def network(reversible, keep_attention=False, ff_chunks=3):
    torch.manual_seed(1)
    pairs = [
        (
            PreNorm(16, Attention(dim=16, heads=4, dim_head=4, causal=True, head_chunks=2, keep_attention=keep)),
            PreNorm(16, FeedForward(16, 2, ff_chunks)),
        )
        for keep in (False, keep_attention)
    ]
    return ReversibleSequence(pairs, exact=True, reversible=reversible)


def reversal():
    """Bit for bit what storing gives, twice over one graph, accumulated onto gradients that are there."""
    found = []
    for keep, reversible in ((False, False), (False, True), (True, True)):
        net = network(reversible, keep)
        x = torch.randn(2, 21, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = net(x).sin().sum()
        out.backward(retain_graph=True)
        out.backward()
        net(x).cos().sum().backward()
        found.append((out, x.grad, *(p.grad for p in net.parameters())))
    assert_same(found[1], found[0], 1e-6)
    # What is kept may come from another way than what is computed again, and be rounded to the grid's next step.
    assert_same(found[2], found[0], 1e-4)


def loss():
    """Of a vocabulary larger than the batch, whose gradients wait for backward where some are there already."""
    weight, hidden = torch.randn(50, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    labels = torch.arange(9) * 5
    labels[3] = -100
    for _ in range(2):
        linear_cross_entropy(hidden, weight, labels, chunk_size=4).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    for _ in range(2):
        torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels).backward()
    assert_same([hidden.grad, weight.grad], [t.grad.float() for t in exact], 1e-5)


def model():
    """A language model's step with its loss at the end of the reversible chain."""
    found = []
    for reversible in (False, True):
        torch.manual_seed(4)
        shape = {"num_tokens": 40, "max_seq_len": 32, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "causal": True}
        net = Transformer(**shape, ff_chunks=2, head_chunks=2, reversible=reversible, exact=True)
        tokens = torch.arange(40).view(2, 20)
        for _ in range(2):
            net(tokens, labels=tokens.roll(-1, 1)).backward()
        found.append([p.grad for p in net.parameters()])
    assert_same(found[1], found[0], 1e-5)


def planning():
    """The same plan, or a word on why there is none."""
    config = {"num_tokens": 40, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "causal": True}
    made = result_or_refusal(lambda: plan(config, batch_size=1, seq_len=64, device="cpu"))
    if isinstance(made, str):
        assert "PyTorch" in made
        return
    state = 4 * 4 * sum(p.numel() for p in Transformer(**config, max_seq_len=64).parameters())
    assert state < made.peak_bytes < state + 2**24


def result_or_refusal(function):
    try:
        return function()
    except NotImplementedError as refusal:
        return str(refusal)


def hooks():
    """Of a parameter: they see its gradient once and whole, by hand and in chunks of a module from outside."""
    found = []
    for chunks in (1, 3):
        torch.manual_seed(5)
        outside = Chunked(TokenMLP(), chunks=chunks).double()
        ours = PreNorm(8, FeedForward(8, 2, chunks)).double()
        watched, x = [outside.module.up.weight, ours.fn.net[0].weight], torch.randn(2, 13, 8, dtype=torch.float64)
        for weight in watched:
            weight.register_hook(lambda gradient: gradient.square())
        for _ in range(2):
            ReversibleSequence([(outside, ours)])(x).sin().sum().backward()
        found.append([p.grad for net in (outside, ours) for p in net.parameters()])
    assert_same(found[1], found[0], 1e-9)


# Where nobody can tell whether a layer is as it was built, it is computed as a whole.
@pytest.mark.filterwarnings("ignore:head_chunks")
@pytest.mark.parametrize("core", [attention, reversal, loss, model, planning, hooks], ids=lambda core: core.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_what_serves_instead(name, core):
    torch.manual_seed(0)
    with taken_away(name):
        assert ALL[name]() is None
        core()


def test_this_pytorch_has_them_all():
    """Else a test of what serves instead would compare it with itself."""
    missing = [name for name, part in ALL.items() if part() is None]
    assert not missing
    assert len(NAMES) >= 8


def test_a_part_is_looked_up_once_and_only_when_asked_for():
    looks = []
    part = Capability("part", lambda: looks.append(1) or "found")
    assert not looks
    assert [part(), part()] == ["found", "found"]
    assert looks == [1]


def test_an_operator_of_another_signature_is_none_of_ours():
    assert operator("aten::mm", ("self", "mat2")) is torch.ops.aten.mm.default
    assert operator("aten::mm", ("self", "other")) is None
    for name in ("aten::no_such_operator", "aten::mm.no_such_overload"):
        with pytest.raises(AttributeError):
            operator(name, ())
        assert Capability("x", lambda name=name: operator(name, ()))() is None
