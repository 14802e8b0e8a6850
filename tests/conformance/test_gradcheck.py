"""Numerical derivatives in fp64 on tiny shapes, one feature at a time: independent of the reference's own autograd."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from memory_efficient_attention_pytorch import Attention, CosineSimAttention, FlashAttention, dot_product_attention
from tests.conformance.cases import BACKENDS, Case, make_inputs, serve_or_skip

CASES = [
    Case("plain", n=3, m=5),
    Case("causal", n=4, causal=True),
    Case("causal-more-keys", n=3, m=5, causal=True),
    Case("causal-more-queries", n=5, m=3, causal=True),
    Case("padding", n=3, m=5, mask="right padding"),
    Case("hidden-rows", n=3, m=4, mask="one row all hidden"),
    Case("full-mask", n=3, m=4, mask="bhnm"),
    Case("window", n=5, window=(1, 2)),
    Case("documents", n=5, documents=True),
    Case("bias", n=3, m=4, bias="1hnm"),
    Case("bias-keys", n=3, m=4, bias="b11m"),
    Case("bias-module", n=3, m=4, bias="module"),
    Case("dropout", n=3, m=4, dropout=0.4),
    Case("gqa", n=3, m=4, h=2, kv=1),
    Case("value-width", n=3, m=4, e=1),
    Case("scale", n=3, m=4, scale=0.7),
    Case("everything", n=5, mask="left padding", causal=True, window=3, bias="module", dropout=0.3, kv=1, e=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, case):
    inputs = make_inputs(replace(case, dtype=torch.float64, d=2))
    wanted = inputs.differentiated()

    def attend(*_):
        torch.manual_seed(11)
        bias = inputs.leaves.get("bias", inputs.module)
        q, k, v = (inputs.leaves[name] for name in "qkv")
        kwargs = inputs.fixed | {"attn_bias": bias, "backend": backend}
        return dot_product_attention(q, k, v, q_bucket_size=2, k_bucket_size=3, **kwargs)

    serve_or_skip(backend, attend)
    assert gradcheck(attend, tuple(wanted.values()))


@pytest.mark.parametrize("kwargs", [{}, {"kv_heads": 1}, {"head_chunks": 2}, {"window": 2}], ids=str)
@pytest.mark.parametrize("kind", [Attention, FlashAttention])
def test_attention_layers(kind, kwargs):
    layer = kind(dim=3, heads=2, dim_head=2, causal=True, q_bucket_size=2, k_bucket_size=2, **kwargs).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False, True, True, True]])
    assert gradcheck(lambda x, *_: layer(x, mask=mask), (x, *layer.parameters()))


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_cosine_layer(memory_efficient):
    layer = CosineSimAttention(dim=3, seq_len=4, heads=2, dim_head=2, causal=True, memory_efficient=memory_efficient)
    layer = layer.double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
