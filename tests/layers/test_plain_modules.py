"""Networks are built of PyTorch's own linear layers; the faster products are inside the branches' own passes."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
from torch.ao.quantization import quantize_dynamic

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.common import products
from tests.agreement import assert_same
from tests.memory.live_bytes import LiveBytes

SHAPE = {"num_tokens": 256, "max_seq_len": 128, "dim": 512, "depth": 2, "causal": True}


def build(**kwargs):
    torch.manual_seed(0)
    return Transformer(**{**SHAPE, **kwargs})


def layers(model, kind):
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore:.*quantiz:UserWarning")
@pytest.mark.parametrize("pieces", [{}, {"head_chunks": 2, "ff_chunks": 4}], ids=str)
def test_every_layer_can_be_quantized(pieces):
    """Its layers then run by themselves, of which a warning tells where pieces were asked for."""
    if "none" in torch.backends.quantized.engine:
        pytest.skip("PyTorch was built without quantized kernels")
    model, x = build(dim=64, **pieces).eval(), torch.randint(256, (2, 16))
    assert len(layers(model, nn.Linear)) == 5 * 2 + 1
    small = quantize_dynamic(model, {nn.Linear})
    assert len(layers(small, QuantizedLinear)) == 5 * 2 + 1
    assert not layers(small, nn.Linear)
    with torch.no_grad():
        truth = model(x)
        if pieces:
            with pytest.warns(match="head_chunks: FlashAttention is computed as a whole"):
                out = small(x)
        else:
            out = small(x)
    assert (out - truth).abs().max() < 0.05 * truth.abs().max()


def onednn_products(function):
    with LiveBytes() as count:
        function()
    return count.calls["_linear_pointwise"]


@pytest.mark.parametrize("pieces", [{}, {"head_chunks": 2, "ff_chunks": 4}], ids=str)
def test_onednn_multiplies_in_the_branches_own_passes(pieces, monkeypatch):
    """As on a CPU on which it is the faster one: one piece or several, wherever activations are recomputed."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    model, stored = build(**pieces), build(reversible=False)
    x = torch.randint(256, (4, 128))
    # Per layer q, k and v at once, out and two of the feed-forward: forward, again, and a gradient of input and weight.
    assert onednn_products(lambda: model(x, labels=x).backward()) >= 2 * 4 * 4
    stored(x, labels=x).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in stored.parameters()], 1e-3)


def test_one_piece_on_the_grid_has_the_bits_of_storing_everything():
    model, stored = build(dim=64, exact=True), build(dim=64, exact=True, reversible=False)
    x = torch.randint(256, (2, 128))
    for net in (model, stored):
        net(x, labels=x).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in stored.parameters()], 0.0)


def test_copies_are_plain_too():
    assert len(layers(copy.deepcopy(build(dim=64)), nn.Linear)) == 11
