"""Weights that a bias makes negligible: tiles of nothing else are left out, and nothing changes by it."""

import math

import pytest
import torch

from memory_efficient_attention_pytorch import AlibiBias, dot_product_attention
from memory_efficient_attention_pytorch.attention.cpu_kernel import CpuKernel
from memory_efficient_attention_pytorch.torch_internals import attention_kernels
from tests import reference
from tests.agreement import skip_unless_usable
from tests.memory.live_bytes import LiveBytes

WAYS = ("products", "cpu_kernel", "onednn")
BUCKETS = {"q_bucket_size": 64, "k_bucket_size": 64}
N, D = 512, 32


class Falling(torch.nn.Module):
    """A bias that falls by a learned slope per token, from wherever ``nearest`` of the query is."""

    def __init__(self, slope: float, nearest: int = 0) -> None:
        super().__init__()
        self.slope, self.nearest = torch.nn.Parameter(torch.tensor([slope, slope / 4], dtype=torch.float64)), nearest

    def forward(self, i, j):
        return -self.slope[:, None, None] * (i[:, None] - j - self.nearest).abs().to(self.slope.dtype)


def heads(kv=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, h, N, D, generator=generator).requires_grad_() for h in (2, kv, kv)]


def results(leaves, dtype, **kwargs):
    """Output, log-sum-exp and gradients of the same values in ``dtype``; through the log-sum-exp for a learned bias."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    learned = [p for p in kwargs["attn_bias"].parameters() if p.requires_grad]
    out, lse = dot_product_attention(*leaves, return_lse=True, **kwargs)
    seen = lse.masked_fill(lse == -math.inf, 0.0)
    total = (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)).sum()
    total = total + seen.sum() / 8 if learned else total
    return [out.detach(), seen.detach(), *torch.autograd.grad(total, leaves + learned)]


MASKS = {
    "causal": {"causal": True},
    "both sides": {},
    "documents": {"causal": True, "document_ids": (torch.arange(N) // 200)[None]},
    # Some queries see only what is far: negligible is relative to what a row sees.
    "far keys alone": {"mask": (torch.arange(N) < 70)[None]},
    "nothing seen": {"causal": True, "mask": (torch.arange(N) >= 100)[None]},
    "dropout": {"causal": True, "dropout": 0.2},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("nearest", [0, 300])
@pytest.mark.parametrize("way", WAYS)
def test_results_are_those_of_the_definition(way, nearest, name):
    skip_unless_usable(way)
    if way == "cpu_kernel" and "dropout" in MASKS[name]:
        pytest.skip("the kernel has no dropout")
    # The kernel's backward serves neither a learned bias nor the log-sum-exp's gradient.
    bias = Falling(4.0, nearest).requires_grad_(way != "cpu_kernel")
    kwargs = {**MASKS[name], **BUCKETS, "attn_bias": bias}
    found = []
    for backend, dtype in ((way, torch.float32), ("naive", torch.float32), ("naive", torch.float64)):
        torch.manual_seed(0)  # of the dropout
        found.append(results(heads(kv=1 if nearest else 2), dtype, backend=backend, **kwargs))
    for ours, plain, truth in zip(*found, strict=True):
        allowed = 1e-5 + 4 * float((plain - truth).abs().max()) / max(float(truth.abs().max()), 1e-30)
        reference.assert_close("result", ours, truth, allowed)


@pytest.mark.parametrize("way", WAYS)
def test_large_scores_are_not_taken_for_negligible(way):
    """A far key whose product with the query outweighs its bias has all the weight."""
    skip_unless_usable(way)
    q, k, v = (x.detach() for x in heads())
    k[:, :, 3] = 0.0
    k[:, :, 3, 0], q[..., 0] = 600.0 * D**0.5, 4.0
    kwargs = {"causal": True, "attn_bias": Falling(4.0).requires_grad_(False), **BUCKETS}
    found, truth = (
        results((q, k, v), t, backend=b, **kwargs) for b, t in ((way, torch.float32), ("naive", torch.float64))
    )
    reference.assert_close("out", found[0], truth[0], 1e-4)
    reference.assert_close("the far value alone", found[0][:, :, 400], v[:, :, 3], 1e-4)


def computed(way, monkeypatch, leaves, **kwargs):
    """The tiles of 64 × 64 that forward and backward computed."""
    if way == "cpu_kernel":
        kernel, counts = attention_kernels.cpu_kernel(), [0, 0]

        def counted(which, call):
            def wrapped(*args, **kw):
                counts[which] += args[0].shape[0] * args[0].shape[1]
                return call(*args, **kw)

            return wrapped

        counting = kernel._replace(forward=counted(0, kernel.forward), backward=counted(1, kernel.backward))
        monkeypatch.setattr(attention_kernels, "cpu_kernel", lambda: counting)
        out = dot_product_attention(*leaves, backend=way, **BUCKETS, **kwargs)
        torch.autograd.grad(out.sum(), leaves)
        return counts
    with LiveBytes() as forward:
        out = dot_product_attention(*leaves, backend=way, **BUCKETS, **kwargs)
    with LiveBytes() as backward:
        torch.autograd.grad(out.sum(), leaves)
    return [forward.products // 2, backward.products // 5]


@pytest.mark.parametrize("way", ["cpu_kernel", "onednn"])
def test_tiles_of_negligible_weights_are_not_computed(way, monkeypatch):
    skip_unless_usable(way)
    monkeypatch.setattr(CpuKernel, "elements", lambda *_: 64 * 64)
    leaves = heads()
    rows = N // 64
    everything = 2 * rows * (rows + 1) // 2
    causal = computed(way, monkeypatch, leaves, causal=True, attn_bias=torch.zeros(1, 2, N, N))
    assert causal == [everything, everything]
    # A slope of 4 leaves each query about 30 tokens, so each row of tiles its last two.
    steep = Falling(4.0).requires_grad_(False)
    steep.slope[1] = 4.0
    assert computed(way, monkeypatch, leaves, causal=True, attn_bias=steep) == [2 * (2 * rows - 1)] * 2
    # On both sides of the query, three.
    assert computed(way, monkeypatch, leaves, attn_bias=steep) == [2 * (3 * rows - 2)] * 2
    # ALiBi's slopes for two heads, 1/16 and 1/256, leave all of 512 tokens.
    assert computed(way, monkeypatch, leaves, causal=True, attn_bias=AlibiBias(2)) == [everything, everything]


def test_the_fused_kernel_meets_no_denormal_weight_in_backward(monkeypatch):
    """In rows whose bias falls weights are 0 or normal: what denormal ones would add is far below rounding."""
    skip_unless_usable("cpu_kernel")
    leaves, bias = heads(), Falling(0.7).requires_grad_(False)
    tiny, seen, kernel = torch.finfo(torch.float32).tiny, [], attention_kernels.cpu_kernel()

    def backward(grad_out, q, k, v, out, lse, *args, attn_mask, scale):
        weights = (q @ k.mT * scale + attn_mask - lse.unsqueeze(-1)).exp()
        seen.append(int(((weights > 0) & (weights < tiny)).sum()))
        return kernel.backward(grad_out, q, k, v, out, lse, *args, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(attention_kernels, "cpu_kernel", lambda: kernel._replace(backward=backward))
    buckets = {"q_bucket_size": 512, "k_bucket_size": 512}
    out = dot_product_attention(*leaves, causal=True, attn_bias=bias, backend="cpu_kernel", **buckets)
    torch.autograd.grad(out.sum(), leaves)
    assert seen
    assert sum(seen) == 0


@pytest.mark.parametrize("slope", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("future", [{"q": 1e3}, {"k": 1e3}, {"k": 1e20}, {"q": 30.0, "k": 30.0, "v": 1e28}])
@pytest.mark.parametrize("first", [201, 255])
@pytest.mark.parametrize("way", WAYS)
def test_the_future_decides_about_no_weight(way, first, future, slope):
    """Where far values are so large that weights below 2**-100 show, whether these count depends on the past alone."""
    skip_unless_usable(way)
    if way != "products" and future.get("k") == 1e20:
        pytest.skip("the kernels refuse such keys")
    generator = torch.Generator().manual_seed(0)
    heads = {name: torch.randn(1, 2, 256, D, generator=generator) / 100 for name in "qkv"}
    heads["v"][:, :, :64], heads["v"][:, :, 64:] = 1e28, 0.0
    other = {name: x.clone() for name, x in heads.items()}
    for name, norm in future.items():
        x = torch.randn(1, 2, 256 - first, D, generator=generator)
        other[name][:, :, first:] = x * norm / x.norm(dim=-1, keepdim=True)
    found = []
    for given in (heads, other):
        leaves = [x.requires_grad_() for x in given.values()]
        bias = Falling(slope).requires_grad_(False)
        out, lse = dot_product_attention(*leaves, causal=True, attn_bias=bias, backend=way, return_lse=True, **BUCKETS)
        gradients = torch.autograd.grad(out[:, :, :first].sum(), leaves)
        found.append([x[:, :, :first] for x in (out, lse, *gradients)])
    for name, ours, others in zip(("out", "lse", "dq", "dk", "dv"), *found, strict=True):
        assert ours.isfinite().all(), name
        assert torch.equal(ours, others), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0)])
def test_no_queries_or_keys_have_no_bound(way, n, m):
    skip_unless_usable(way)
    q, k = torch.zeros(1, 2, n, D), torch.zeros(1, 2, m, D)
    assert dot_product_attention(q, k, k, attn_bias=AlibiBias(2), backend=way).shape == (1, 2, n, D)


@pytest.mark.parametrize("way", WAYS)
def test_a_default_device_changes_nothing(way):
    skip_unless_usable(way)
    with torch.no_grad():
        q, k, v = (10 * x for x in heads())
        bias = Falling(4.0)
        expected = dot_product_attention(q, k, v, causal=True, attn_bias=bias, backend=way, **BUCKETS)
        with torch.device("meta"):
            found = dot_product_attention(q, k, v, causal=True, attn_bias=bias, backend=way, **BUCKETS)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["products", "cpu_kernel", "onednn"])
def test_scores_of_a_negative_scale_are_not_taken_for_negligible(way):
    skip_unless_usable(way)
    q, k, v = (torch.randn(1, 2, 512, 32) for _ in range(3))
    k[:, :, 3] = 0.0
    k[:, :, 3, 0], q[..., 0] = -600.0 * 32**0.5, 4.0

    def bias(i, j):
        return -4.0 * (i[:, None] - j).abs()

    options = {"causal": True, "attn_bias": bias, "scale": -(32**-0.5), "q_bucket_size": 64, "k_bucket_size": 64}
    ours, truth = (
        [
            out := dot_product_attention(*leaves, backend=backend, **options),
            torch.autograd.grad(out.sum(), leaves[2])[0],
        ]
        for backend, leaves in (
            (way, [x.clone().requires_grad_() for x in (q, k, v)]),
            ("naive", [x.double().requires_grad_() for x in (q, k, v)]),
        )
    )
    for mine, true in zip(ours, truth, strict=True):
        assert (mine - true).abs().max() <= 1e-3 * true.abs().max()
