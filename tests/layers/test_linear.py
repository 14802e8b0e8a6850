"""Our linear layer against PyTorch's: the same numbers and gradients, by oneDNN where that is faster, only there."""

import copy

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.common import products
from memory_efficient_attention_pytorch.layers.linear import Linear, is_plain_linear
from tests.memory.live_bytes import LiveBytes


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """As on a CPU on which it is the faster one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def layers(bias=True, inner=512, outer=640):
    layer = Linear(inner, outer, bias=bias)
    plain = nn.Linear(inner, outer, bias=bias)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def onednn_products(function):
    with LiveBytes() as count:
        function()
    return count.calls["_linear_pointwise"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 320, 512), (512, 512), (1, 100, 512), (0, 512), (3, 512), (512,)], ids=str)
def test_equals_pytorchs(shape, bias):
    layer, plain = layers(bias)
    truth = copy.deepcopy(plain).double()
    x = torch.randn(shape)
    upstream = torch.randn(*shape[:-1], 640)
    found, wanted, exact = [], [], []
    for net, into, dtype in ((layer, found, x.dtype), (plain, wanted, x.dtype), (truth, exact, torch.float64)):
        leaf = x.clone().to(dtype).detach().requires_grad_()
        out = net(leaf)
        out.backward(upstream.to(dtype))
        into += [out.detach(), leaf.grad, *(p.grad for p in net.parameters())]
    for ours, theirs, true in zip(found, wanted, exact, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        if ours.numel():
            assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-6 * true.abs().max()


def test_onednn_computes_forward_and_backward():
    layer, plain = layers()
    x = torch.randn(2, 320, 512, requires_grad=True)
    assert onednn_products(lambda: layer(x)) > 0
    loss = layer(x).sum()
    assert onednn_products(loss.backward) > 1
    assert onednn_products(lambda: plain(x)) == 0
    with torch.no_grad():
        assert onednn_products(lambda: layer(x)) > 0
        assert onednn_products(lambda: layer(x[:, :1])) == 1, "a token each of two rows"


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_gradients_that_nobody_wants_are_not_computed(frozen):
    layer, _ = layers()
    x = torch.randn(512, 512, requires_grad=frozen != "x")
    if frozen != "x":
        getattr(layer, frozen).requires_grad_(False)
    layer(x).sum().backward()
    leaves = {"x": x, "weight": layer.weight, "bias": layer.bias}
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == {frozen}


def left_to_pytorch():
    layer, _ = layers()
    x = torch.randn(512, 512)
    yield "fp64", layer.double(), x.double()
    yield "a small weight", Linear(32, 32), torch.randn(512, 32)
    yield "some rows", Linear(512, 640), x[:20]


@pytest.mark.parametrize("case", list(left_to_pytorch()), ids=lambda case: case[0])
def test_left_to_pytorch(case):
    _, layer, x = case
    assert onednn_products(lambda: layer(x)) == 0


def test_autocast_and_function_transforms_are_left_to_pytorch():
    layer, plain = layers()
    x = torch.randn(512, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    by_row = torch.func.vmap(layer)(x[:, None])
    torch.testing.assert_close(by_row[:, 0], plain(x), rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_pytorchs():
    layer, plain = layers()
    x, found = torch.randn(512, 512), []
    for net in (layer, plain):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [leaf, net.weight]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_it_is_a_linear_layer_to_others():
    assert isinstance(Linear(2, 2), nn.Linear)
    assert is_plain_linear(Linear(2, 2))
    assert is_plain_linear(nn.Linear(2, 2))
    assert not is_plain_linear(type("Other", (Linear,), {})(2, 2))
    assert str(Linear(2, 3)) == str(nn.Linear(2, 3))


@pytest.mark.parametrize("exact", [True, False])
def test_default_settings_reach_onednn_in_every_layer_and_agree_with_storing(exact):
    torch.manual_seed(0)
    settings = {"num_tokens": 256, "max_seq_len": 128, "dim": 512, "depth": 2, "causal": True, "exact": exact}
    model = Transformer(**settings)
    stored = Transformer(**settings, reversible=False)
    stored.load_state_dict(model.state_dict())
    x = torch.randint(256, (2, 128))
    # Per layer q, kv, out and two of the feed-forward: forward, again, and a gradient of input and weight each.
    assert onednn_products(lambda: model(x, labels=x).backward()) >= 2 * 5 * 4
    stored(x, labels=x).backward()
    for ours, theirs in zip(model.parameters(), stored.parameters(), strict=True):
        if exact:
            assert torch.equal(ours.grad, theirs.grad)
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
