"""What the package that this one replaces got wrong in attention, one test each: all of these fail there."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.multiprocessing.reductions import StorageWeakRef

from memory_efficient_attention_pytorch import (
    Attention,
    CosineSimAttention,
    FlashAttention,
    numerically_unstable_memory_efficient_attention,
)
from memory_efficient_attention_pytorch.cosine_sim_flash_attention import FlashAttention as CosineSimFlashAttention
from memory_efficient_attention_pytorch.cosine_sim_flash_attention import (
    FlashAttentionFunction as CosineSimFlashAttentionFunction,
)
from memory_efficient_attention_pytorch.flash_attention import FlashAttentionFunction
from memory_efficient_attention_pytorch.memory_efficient_attention import attention, memory_efficient_attention
from tests import reference
from tests.conformance.cases import result_or_message
from tests.memory.live_bytes import FUSED, LiveBytes, saved_bytes

f64 = torch.float64


def flash(q, k, v, mask=None, causal=False, q_bucket_size=4, k_bucket_size=4):
    return FlashAttentionFunction.apply(q, k, v, mask, causal, q_bucket_size, k_bucket_size)


def tiled(q, k, v, mask=None, causal=False, **kwargs):
    buckets = {"q_bucket_size": 4, "k_bucket_size": 4} | kwargs
    return memory_efficient_attention(q, k, v, mask=mask, causal=causal, **buckets)


THREE = pytest.mark.parametrize("attend", [attention, tiled, flash], ids=["attention", "memory_efficient", "flash"])


def qkv(n=10, m=10, h=2, kv=2, b=2, d=8, dtype=f64):
    shapes = ((b, h, n, d), (b, kv, m, d), (b, kv, m, d))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def check(attend, q, k, v, tolerance=1e-10, **kwargs):
    """Output and gradients of `attend` against the definition."""
    out, truth = attend(q, k, v, **kwargs), reference.attention(q, k, v, **kwargs)
    reference.assert_close("out", out, truth, tolerance)
    cotangent = torch.randn_like(truth)
    grads = [torch.autograd.grad(o, (q, k, v), cotangent) for o in (out, truth)]
    for name, ours, true in zip("qkv", *grads, strict=True):
        reference.assert_close(f"d{name}", ours, true, tolerance)


# Attention


@pytest.mark.parametrize(("n", "m"), [(5, 12), (12, 5), (1, 9)])
@THREE
def test_causal_with_unequal_lengths_is_aligned_to_the_end_everywhere(attend, n, m):
    check(attend, *qkv(n, m), causal=True)


@THREE
def test_left_padding_with_causal_leaks_nothing(attend):
    mask = torch.arange(10) >= torch.tensor([[0], [4]])
    q, k, v = qkv()
    check(attend, q, k, v, mask=mask, causal=True)
    assert not attend(q, k, v, mask=mask, causal=True)[1, :, :4].any(), "padded rows see only the future: nothing"


@THREE
def test_fully_masked_rows_are_zero_in_every_path(attend):
    mask = torch.tensor([[True] * 10, [False] * 10])
    q, k, v = qkv()
    check(attend, q, k, v, mask=mask)
    assert not attend(q, k, v, mask=mask)[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layer", [FlashAttention, partial(Attention, memory_efficient=True)], ids=["flash", "tiled"])
def test_pure_half_precision_trains(layer, dtype):
    net = layer(dim=16, heads=2, dim_head=8, causal=True, q_bucket_size=4, k_bucket_size=4).to(dtype)
    x = torch.randn(2, 9, 16).to(dtype).requires_grad_()
    out = net(x)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    double = [w.detach().double().requires_grad_() for w in (net.to_q.weight, net.to_kv.weight, net.to_out.weight)]
    truth = reference.attention_layer(x.detach().double(), *double, heads=2, causal=True)
    reference.assert_close("out", out, truth, 8 * torch.finfo(dtype).eps)
    for ours, true in zip(net.parameters(), torch.autograd.grad(truth.square().mean(), double), strict=True):
        reference.assert_close("gradient", ours.grad, true, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layer", [FlashAttention, partial(Attention, memory_efficient=True)], ids=["flash", "tiled"])
def test_autocast_trains(layer):
    net = layer(dim=16, heads=2, dim_head=8, causal=True, q_bucket_size=4, k_bucket_size=4)
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    out.float().square().mean().backward()
    weights = [w.detach().clone().requires_grad_() for w in (net.to_q.weight, net.to_kv.weight, net.to_out.weight)]
    truth = reference.attention_layer(x, *weights, heads=2, causal=True)
    for ours, true in zip(net.parameters(), torch.autograd.grad(truth.square().mean(), weights), strict=True):
        reference.assert_close("gradient", ours.grad, true, 2e-2)


@pytest.mark.parametrize("attend", [tiled, flash], ids=["memory_efficient", "flash"])
def test_float64_passes_gradcheck(attend):
    mask = torch.tensor([[True, True, True, False]])
    assert gradcheck(lambda q, k, v: attend(q, k, v, mask=mask, causal=True), tuple(qkv(4, 4, b=1, d=2)))


def test_the_accumulator_is_wider_than_bf16():
    """Over 512 tiles a bf16 running sum of 0.4 stops growing near 100; the mean of the values is then half."""
    q, k = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 512, 8, dtype=torch.bfloat16)
    v = torch.full((1, 1, 512, 8), 0.4, dtype=torch.bfloat16)
    out = flash(q, k, v, k_bucket_size=1)
    reference.assert_close("mean", out, v.double().mean(2, keepdim=True), 2.0**-8)


def test_row_sums_of_output_and_cotangent_are_formed_once_per_query_tile_at_most():
    """Reads of the output in backward, outside of fused kernels, do not multiply with the number of key tiles."""

    def reads(k_bucket_size):
        q, k, v = qkv(16, 64, dtype=torch.float32)
        out = flash(q, k, v, q_bucket_size=8, k_bucket_size=k_bucket_size)
        storage, cotangent = out.untyped_storage()._cdata, torch.ones_like(out)

        class Reads(LiveBytes):
            count = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                is_read = any(isinstance(a, torch.Tensor) and a.untyped_storage()._cdata == storage for a in args)
                self.count += is_read and not func.is_view and FUSED not in func.name()
                return super().__torch_dispatch__(func, types, args, kwargs)

        with Reads() as count:
            out.backward(cotangent)
        return count.count

    assert reads(4) == reads(64)
    assert 1 <= reads(4) <= 2, "one read per query tile, or one for all"


@THREE
def test_a_second_derivative_never_vanishes_silently(attend):
    q, k, v = qkv(4, 5)

    def second(function):
        (dq,) = torch.autograd.grad(function(q, k, v).square().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), q)[0]

    ours = result_or_message(lambda: second(attend))
    if isinstance(ours, str):
        assert re.search("differentia|derivative", ours)
    else:
        torch.testing.assert_close(ours, second(reference.attention))


@THREE
def test_masks_pass_through_saved_tensor_hooks(attend):
    """A hook that moves saved tensors elsewhere moves the mask too: nothing else keeps it alive."""
    q, k, v = qkv()
    mask = torch.rand(2, 1, 10, 10) > 0.3
    kept_mask = mask.clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = attend(q, k, v, mask=mask)
    storage = StorageWeakRef(mask.untyped_storage())
    del mask
    assert storage.expired()
    ours = torch.autograd.grad(out.sum(), q)[0]
    truth = torch.autograd.grad(reference.attention(q, k, v, mask=kept_mask).sum(), q)[0]
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("kv", [1, 2])
@THREE
def test_fewer_key_heads_run_forward_and_backward(attend, kv):
    check(attend, *qkv(h=4, kv=kv), causal=True)


def test_flash_attention_takes_bias_dropout_and_key_heads():
    net = FlashAttention(dim=16, heads=4, dim_head=4, kv_heads=2, dropout=0.5, q_bucket_size=4, k_bucket_size=4)
    x, bias = torch.randn(2, 9, 16), torch.randn(4, 9, 9, requires_grad=True)
    assert not net(x, attn_bias=bias).equal(net(x, attn_bias=bias)), "dropout is at work"
    weights = net.to_q.weight, net.to_kv.weight, net.to_out.weight
    ours = net.eval()(x, attn_bias=bias)
    truth = reference.attention_layer(x, *weights, heads=4, kv_heads=2, attn_bias=bias)
    reference.assert_close("out", ours, truth, 1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), bias)[0] for out in (ours, truth)]
    reference.assert_close("dbias", *gradients, 1e-5)


@pytest.mark.parametrize("attend", [attention, tiled], ids=["attention", "memory_efficient"])
def test_dropout_falls_on_the_normalised_probabilities_in_both_paths(attend):
    """Rows of dropped weights sum to 1 only on average; dropped before the normaliser they always would."""
    q, k, _ = qkv(n=200, m=50)
    ones = torch.ones_like(k)
    sums = attend(q, k, ones, dropout=0.5, training=True)[..., 0]
    assert (sums - 1).abs().mean() > 0.05
    assert abs(sums.mean().item() - 1) < 0.05
    torch.testing.assert_close(attend(q, k, ones, dropout=0.5, training=False), torch.ones_like(q))


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_layer_dropout_works_in_training_only(memory_efficient):
    net = Attention(dim=16, heads=2, dim_head=8, dropout=0.5, memory_efficient=memory_efficient)
    x = torch.randn(2, 9, 16)
    assert not net(x).equal(net(x))
    net.eval()
    assert net(x).equal(net(x))


@pytest.mark.parametrize("shape", [(2, 2, 10, 12), (1, 1, 10, 12), (2, 1, 1, 12), (2, 1, 10, 1)], ids=str)
@THREE
def test_four_dimensional_masks(attend, shape):
    check(attend, *qkv(10, 12), mask=torch.rand(shape) > 0.4)


@pytest.mark.parametrize("shape", [(1, 2, 1, 12), (2, 1, 10, 1), (10, 12), (2, 10, 12), (1, 1, 1, 1)], ids=str)
def test_broadcast_biases(shape):
    check(tiled, *qkv(10, 12), attn_bias=torch.randn(shape, dtype=f64))


def test_a_gradient_of_the_bias_alone_is_memory_efficient_too():
    """Then nothing quadratic is saved but the bias itself, which is here only one row."""

    def saved(n):
        q, k, v = (t.detach() for t in qkv(n, n))
        bias = torch.zeros(1, 2, 1, n, dtype=f64, requires_grad=True)
        return saved_bytes(lambda: tiled(q, k, v, attn_bias=bias, q_bucket_size=16, k_bucket_size=16))

    assert saved(128) <= 2.05 * saved(64)


def test_saved_bytes_grow_as_the_length():
    def saved(n):
        q, k, v = qkv(n, n)
        return saved_bytes(lambda: tiled(q, k, v, causal=True, q_bucket_size=16, k_bucket_size=16))

    assert saved(256) <= 2.05 * saved(128)


# Cosine similarity


def cosine_flash(q, k, v, mask=None, scale=16, causal=False, q_bucket_size=3, k_bucket_size=4):
    return CosineSimFlashAttentionFunction.apply(q, k, v, mask, scale, causal, q_bucket_size, k_bucket_size)


@pytest.mark.parametrize(("n", "m"), [(10, 10), (10, 13), (13, 10)])
def test_cosine_masks_are_cut_by_key_buckets(n, m):
    q, k, v = qkv(n, m)
    mask = torch.arange(m) < torch.tensor([[m], [m - 4]])

    def normalised(function):
        return lambda q, k, v, **kwargs: function(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, **kwargs)

    ours = normalised(partial(cosine_flash, scale=8))
    truth = normalised(partial(reference.attention, scale=8))
    cotangent = torch.randn_like(q)
    results = []
    for function in (ours, truth):
        out = function(q, k, v, mask=mask)
        results.append([out, *torch.autograd.grad(out, (q, k, v), cotangent)])
    for name, mine, true in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        reference.assert_close(name, mine, true, 1e-10)


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.float16], ids=["fp64", "fp32", "fp16"])
def test_cosine_weights_are_never_clamped_nor_lost(dtype):
    """Keys opposite to their queries: every weight is exp(-2 scale) before normalising, and still they sum to 1."""
    q = F.normalize(torch.randn(1, 2, 6, 8), dim=-1).to(dtype)
    k = -q[:, :, :1].expand(1, 2, 9, 8)
    q = q[:, :, :1].expand(1, 2, 6, 8)
    v = torch.randn(1, 2, 9, 8).to(dtype)
    out = cosine_flash(q, k, v, scale=32)
    truth = v.double().mean(2, keepdim=True).expand(1, 2, 6, 8)
    reference.assert_close("mean of the values", out, truth, max(1e-6, 4 * torch.finfo(dtype).eps))


def test_cosine_flash_layer_in_half_precision():
    net = CosineSimFlashAttention(dim=16, heads=2, dim_head=8, causal=True).half()
    x = torch.randn(2, 9, 16).half().requires_grad_()
    out = net(x)
    log_scale = torch.full((1, 2, 1, 1), math.log(net.scale), dtype=f64)
    weights = [w.detach().double() for w in (net.to_q.weight, net.to_kv.weight, net.to_out.weight)]
    truth = reference.cosine_attention_layer(x.detach().double(), *weights, log_scale, heads=2, causal=True)
    reference.assert_close("out", out, truth, 1e-2)
    out.float().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_cosine_half_precision_keeps_large_scales(memory_efficient):
    """exp(scale) of a learned scale overflows fp16 from 11 on; the softmax must not."""
    net = CosineSimAttention(dim=16, seq_len=64, heads=2, dim_head=8, memory_efficient=memory_efficient).half()
    nn.init.constant_(net.scale, math.log(24))
    x = torch.randn(2, 9, 16).half()
    weights = [w.detach().double() for w in (net.to_q.weight, net.to_kv.weight, net.to_out.weight, net.scale)]
    truth = reference.cosine_attention_layer(x.double(), *weights, heads=2)
    reference.assert_close("out", net(x), truth, 2e-2)


def test_cosine_unstable_function_is_stable():
    q, k, v = qkv()
    ours = numerically_unstable_memory_efficient_attention(100 * q, 100 * k, v, q_bucket_size=4, k_bucket_size=4)
    reference.assert_close("out", ours, reference.attention(100 * q, 100 * k, v, scale=1.0), 1e-9)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_cosine_dropout_is_applied(memory_efficient):
    net = CosineSimAttention(dim=16, seq_len=64, heads=2, dim_head=8, dropout=0.5, memory_efficient=memory_efficient)
    x = torch.randn(2, 9, 16)
    assert not net(x).equal(net(x))
    net.eval()
    assert net(x).equal(net(x))


def test_cosine_scale_starts_at_the_papers_value():
    net = CosineSimAttention(dim=16, seq_len=1024, heads=2, dim_head=8)
    expected = math.log2(1024**2 - 1024)
    torch.testing.assert_close(net.scale.exp(), torch.full((1, 2, 1, 1), expected))
