"""The layers against their definitions: outputs, and gradients of inputs and parameters."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from memory_efficient_attention_pytorch import (
    AlibiBias,
    Attention,
    CosineSimAttention,
    FeedForward,
    FlashAttention,
    RelativePositionBias,
)
from memory_efficient_attention_pytorch.cosine_sim_flash_attention import FlashAttention as CosineSimFlashAttention
from tests import reference
from tests.agreement import assert_same
from tests.conformance.cases import LearnedBias


def assert_agree(out, truth, wanted):
    """Outputs, and gradients of what is wanted."""
    reference.assert_close("out", out, truth, 1e-5)
    assert_same(*(torch.autograd.grad(o.square().sum(), wanted) for o in (out, truth)), 1e-4)


@pytest.mark.parametrize(
    "override", [{}, {"memory_efficient": True}, {"q_bucket_size": 3, "k_bucket_size": 2}], ids=str
)
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_layer(causal, memory_efficient, override):
    net = Attention(dim=16, heads=2, dim_head=8, causal=causal, memory_efficient=memory_efficient)
    x, context = torch.randn(2, 9, 16, requires_grad=True), torch.randn(2, 12, 16, requires_grad=True)
    bias, mask = torch.randn(2, 9, 12, requires_grad=True), torch.rand(2, 12) > 0.3
    out = net(x, context=context, mask=mask, attn_bias=bias, **override)
    weights = net.to_q.weight, net.to_kv.weight, net.to_out.weight
    kwargs = {"context": context, "mask": mask, "attn_bias": bias, "causal": causal}
    truth = reference.attention_layer(x, *weights, heads=2, **kwargs)
    assert_agree(out, truth, (x, context, bias, *weights))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kv_heads": 2},
        {"kv_heads": 1, "causal": True},
        {"window": 3},
        {"window": (2, 0), "causal": True},
        {"head_chunks": 2},
        {"head_chunks": 4, "kv_heads": 4, "causal": True},
        {"head_chunks": 2, "kv_heads": 2, "window": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Attention, FlashAttention])
def test_attention_layer_beyond_upstream(kind, kwargs):
    net = kind(dim=16, heads=4, dim_head=4, q_bucket_size=4, k_bucket_size=3, **kwargs)
    x, mask = torch.randn(2, 13, 16, requires_grad=True), torch.rand(2, 13) > 0.2
    weights = net.to_q.weight, net.to_kv.weight, net.to_out.weight
    what = {name: value for name, value in kwargs.items() if name != "head_chunks"}
    out, truth = net(x, mask=mask), reference.attention_layer(x, *weights, heads=4, mask=mask, **what)
    assert_agree(out, truth, (x, *weights))


@pytest.mark.parametrize("kind_of_bias", ["1hnm", "b1nm", "hnm", "11nm", "T5", "learned"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"kv_heads": 2}, {"head_chunks": 2}, {"head_chunks": 4, "kv_heads": 2}], ids=str
)
def test_biases_through_head_groups(kwargs, kind_of_bias):
    """Each group of heads takes its own part of a bias; the gradient of what the groups share is their sum."""
    net = FlashAttention(dim=16, heads=4, dim_head=4, causal=True, q_bucket_size=4, k_bucket_size=3, **kwargs)
    x = torch.randn(2, 9, 16, requires_grad=True)
    modules = {"T5": RelativePositionBias(4, num_buckets=8, max_distance=6), "learned": LearnedBias(4)}
    if kind_of_bias in modules:
        bias = modules[kind_of_bias]
        torch.nn.init.normal_(next(bias.parameters()))
        wanted = (x, *net.parameters(), *bias.parameters())
    else:
        sizes = {"b": 2, "h": 4, "n": 9, "m": 9, "1": 1}
        bias = torch.randn([sizes[letter] for letter in kind_of_bias], requires_grad=True)
        wanted = (x, *net.parameters(), bias)
    weights = net.to_q.weight, net.to_kv.weight, net.to_out.weight
    what = {"heads": 4, "causal": True, "attn_bias": bias, "kv_heads": kwargs.get("kv_heads")}
    out, truth = net(x, attn_bias=bias), reference.attention_layer(x, *weights, **what)
    assert_agree(out, truth, wanted)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_cosine_layer(causal, memory_efficient):
    net = CosineSimAttention(
        dim=16, seq_len=13, heads=2, dim_head=8, causal=causal, memory_efficient=memory_efficient, q_bucket_size=4
    )
    assert net.scale.shape == (1, 2, 1, 1)
    x, mask = torch.randn(2, 13, 16, requires_grad=True), torch.rand(2, 13) > 0.2
    wanted = (x, net.to_q.weight, net.to_kv.weight, net.to_out.weight, net.scale)
    out, truth = net(x, mask=mask), reference.cosine_attention_layer(*wanted, heads=2, mask=mask, causal=causal)
    assert_agree(out, truth, wanted)


def test_cosine_flash_layer():
    net = CosineSimFlashAttention(dim=16, scale=10, heads=2, dim_head=8, causal=True, q_bucket_size=4, k_bucket_size=3)
    x = torch.randn(2, 13, 16, requires_grad=True)
    wanted = (x, net.to_q.weight, net.to_kv.weight, net.to_out.weight)
    log_scale = torch.full((1, 2, 1, 1), 10.0).log()
    out, truth = net(x), reference.cosine_attention_layer(*wanted, log_scale, heads=2, causal=True)
    assert_agree(out, truth, wanted)


@pytest.mark.parametrize("chunks", [1, 2, 5, 50])
def test_feed_forward(chunks):
    net, x = FeedForward(16, 3, chunks), torch.randn(2, 13, 16, requires_grad=True)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert shapes == {"net.0.weight": (48, 16), "net.0.bias": (48,), "net.2.weight": (16, 48), "net.2.bias": (16,)}
    w = dict(net.named_parameters())
    wanted, out = (x, *w.values()), net(x)
    truth = F.linear(F.gelu(F.linear(x, w["net.0.weight"], w["net.0.bias"])), w["net.2.weight"], w["net.2.bias"])
    assert_agree(out, truth, wanted)


@pytest.mark.parametrize("heads", [2, 8])
def test_alibi(heads):
    i, j = torch.arange(5) + 30, torch.arange(40)
    ours = AlibiBias(heads)(i, j).expand(1, heads, 5, 40)[0].double()
    seen = j[None, :] <= i[:, None]  # on keys after the query, which ALiBi's paper never has, any sign is a choice
    torch.testing.assert_close(ours[:, seen], reference.alibi(heads)(i, j)[:, seen])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_bias(bidirectional):
    bias = RelativePositionBias(2, num_buckets=16, max_distance=50, bidirectional=bidirectional)
    (table,) = bias.parameters()
    assert set(table.shape) == {2, 16}
    with torch.no_grad():
        table.copy_(torch.randn_like(table))
    i, j = torch.arange(7) + 60, torch.arange(130)
    buckets = [[reference.t5_bucket(key - query, 16, 50, bidirectional) for key in j.tolist()] for query in i.tolist()]
    by_head = table.detach() if table.shape[0] == 2 else table.detach().T
    torch.testing.assert_close(bias(i, j).expand(1, 2, 7, 130)[0], by_head[:, torch.tensor(buckets)])


@pytest.mark.parametrize("kind", [partial(CosineSimAttention, seq_len=6), CosineSimFlashAttention])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tokens_of_zeros_have_no_direction(kind, dtype):
    """In fp16 a norm of 0 plus 1e-12 is 0."""
    net, x = kind(dim=8, heads=2, dim_head=4).to(dtype), torch.randn(1, 6, 8).to(dtype)
    x[:, 2:4] = 0
    x.requires_grad_()
    out = net(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad[:, [0, 1, 4, 5]].isfinite().all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("table", [(1, 8), (8, 1), (8, 2), (3, 8, 4), (8,)], ids=str)
def test_rotary_positions_of_other_tokens_are_refused(table, groups):
    net = Attention(dim=16, heads=2, dim_head=8, head_chunks=groups)
    with pytest.raises(ValueError, match="rotary: expected cosines and sines of shape"):
        net(torch.randn(2, 8, 16), rotary=(torch.zeros(table), torch.zeros(table)))
