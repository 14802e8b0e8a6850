"""Attention's memory is linear in the number of tokens with everything on at once, and empty tiles cost nothing."""

import pytest
import torch

from memory_efficient_attention_pytorch import RelativePositionBias, dot_product_attention
from tests.memory.live_bytes import LiveBytes

MIB = 2**20


def step(n, *, h=2, kv=2, d=16, bias=None, backward=True, buckets=(128, 128), **kwargs):
    """One forward and backward of attention over n tokens; everything counted above the inputs."""
    q = torch.randn(1, h, n, d, requires_grad=True)
    k, v = (torch.randn(1, kv, n, d, requires_grad=True) for _ in range(2))
    cotangent = torch.randn(1, h, n, d)
    wanted = (q, k, v, *(bias.parameters() if isinstance(bias, torch.nn.Module) else ()))
    with LiveBytes() as count:
        out = dot_product_attention(
            q, k, v, attn_bias=bias, q_bucket_size=buckets[0], k_bucket_size=buckets[1], **kwargs
        )
        if backward:
            torch.autograd.grad(out, wanted, cotangent)
    return count


def everything(n):
    """All that has to be evaluated per tile, at once."""
    return {
        "mask": torch.arange(n)[None] >= n // 10,
        "causal": True,
        "window": n // 2,
        "document_ids": (torch.arange(n) // (n // 3))[None],
        "dropout": 0.1,
    }


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear_with_everything_on(backend, backward):
    bias = RelativePositionBias(2)
    peaks = [step(n, bias=bias, backward=backward, backend=backend, **everything(n)).peak for n in (512, 1024, 2048)]
    for n, shorter, longer in zip((1024, 2048), peaks, peaks[1:], strict=False):
        assert longer <= 2.05 * shorter, f"{shorter} bytes at half of {n} tokens, {longer} at {n}"
    assert peaks[-1] < 2048 * 2048, "less than one byte for each pair of tokens"


FUNCTIONS = {
    "mask function": {"mask": lambda b, h, q, k: (q - k).abs() % 100 < 50},
    "score function": {"bias": lambda score, b, h, q, k: 30 * torch.tanh(score / 30)},
}


@pytest.mark.parametrize(
    "name", ["plain", "causal", "padding", "window", "documents", "gqa", "dropout", "bias", *FUNCTIONS]
)
def test_memory_is_linear_for_each_feature(name):
    def peak(n):
        kwargs = {
            "plain": {},
            "causal": {"causal": True},
            "padding": {"mask": torch.arange(n)[None] < n - 3, "causal": True},
            "window": {"window": 64},
            "documents": {"document_ids": (torch.arange(n) // 100)[None], "causal": True},
            "gqa": {"kv": 1, "causal": True},
            "dropout": {"dropout": 0.1},
            "bias": {"bias": RelativePositionBias(2)},
            **FUNCTIONS,
        }[name]
        return step(n, **kwargs).peak

    assert peak(2048) <= 2.05 * peak(1024)
    assert peak(2048) < 2048 * 2048, "less than one byte for each pair of tokens"


def test_dropout_and_bias_gradient_at_4096_tokens_stay_under_40_mib():
    """Default buckets, 2 heads of 64 in fp32, where PyTorch's own attention takes 392 and 521 MiB."""
    q, k, v = (torch.randn(1, 2, 4096, 64, requires_grad=True) for _ in range(3))
    bias = RelativePositionBias(2)
    with LiveBytes() as count:
        out = dot_product_attention(q, k, v, attn_bias=bias, dropout=0.1)
        torch.autograd.grad(out.sum(), (q, k, v, *bias.parameters()))
    assert count.peak < 40 * MIB, f"{count.peak / MIB:.1f} MiB"


def test_a_broadcast_bias_gradient_is_reduced_per_tile():
    """The gradient of a key bias (1, h, 1, m) never exists at n x m."""

    def peak(n):
        q, k, v = (torch.randn(1, 2, n, 16) for _ in range(3))
        bias = torch.zeros(1, 2, 1, n, requires_grad=True)
        with LiveBytes() as count:
            out = dot_product_attention(q, k, v, attn_bias=bias, q_bucket_size=128, k_bucket_size=128)
            torch.autograd.grad(out.sum(), bias)
        return count.peak

    assert peak(2048) <= 2.05 * peak(1024)


# Tiles skipped: dropout makes every tile plain matrix products, which can be counted.


def products(causal, **kwargs):
    """(forward, backward) matrix products over 32 query buckets x 16 key buckets."""
    kwargs = {"h": 1, "kv": 1, "buckets": (8, 16), "dropout": 0.1, "causal": causal, "backend": "tiled"} | kwargs
    forward, both = step(256, backward=False, **kwargs), step(256, **kwargs)
    assert not both.fused
    return forward.products, both.products - forward.products


def test_empty_causal_tiles_are_skipped():
    """Of 512 tiles 272 hold something: 2 products each forward, 5 backward."""
    assert products(causal=False) == (2 * 512, 5 * 512)
    assert products(causal=True) == (2 * 272, 5 * 272)


def test_empty_causal_tiles_are_skipped_with_a_bias_gradient():
    """Forward a fused kernel may compute a tile; the gradient of its scores takes products."""
    kwargs = {"h": 1, "kv": 1, "buckets": (8, 16), "bias": RelativePositionBias(1), "backend": "tiled"}
    for causal, tiles in ((False, 512), (True, 272)):
        forward = step(256, backward=False, causal=causal, **kwargs)
        assert forward.fused + forward.products / 2 == tiles
        assert step(256, causal=causal, **kwargs).products - forward.products == 5 * tiles


def test_tiles_outside_a_window_are_skipped():
    """A window of one query bucket to each side: at most 3 tiles in a row of 16."""
    seen = sum(
        key_start <= query_start + 7 + 8 and key_start + 15 >= query_start - 8
        for query_start in range(0, 256, 8)
        for key_start in range(0, 256, 16)
    )
    forward, backward = products(causal=False, window=8)
    assert 2 * 32 <= forward <= 2 * seen
    assert 5 * 32 <= backward <= 5 * seen < 5 * 96


def test_tiles_between_documents_are_skipped():
    """Four documents of 64 tokens: a quarter of the tiles."""
    kwargs = {"document_ids": (torch.arange(256) // 64)[None]}
    assert products(causal=False, **kwargs) == (2 * 128, 5 * 128)


def test_tiles_of_padding_are_skipped():
    """The last half of the keys is padding in every row: half of the tiles."""
    assert products(causal=False, mask=(torch.arange(256) < 128)[None]) == (2 * 256, 5 * 256)


def test_full_tiles_do_no_mask_work():
    """Under causal only the tiles on the diagonal, 2 of 17 in the last row, need a mask; the rest is plain."""

    def masking(causal):
        count = step(256, h=1, kv=1, buckets=(8, 16), dropout=0.1, causal=causal, backend="tiled")
        return sum(count.calls[name] for name in ("masked_fill", "masked_fill_", "where", "logical_and", "bitwise_and"))

    plain, causal = masking(False), masking(True)
    # 32 tiles touch the diagonal, once forward and once backward; a tile may spend a few operators on its mask.
    assert causal <= plain * 272 / 512 + 32 * 2 * 4
