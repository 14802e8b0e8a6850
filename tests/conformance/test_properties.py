"""What must hold for every input: searched with hypothesis, and asserted bit for bit where that is promised."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_efficient_attention_pytorch import dot_product_attention
from tests import reference
from tests.agreement import skip_unless_usable
from tests.conformance.cases import PATHS, LearnedBias

f64 = torch.float64
lengths = st.integers(1, 40)
buckets = st.tuples(st.integers(1, 48), st.integers(1, 48))
seeds = st.integers(0, 2**20)
windows = st.none() | st.integers(0, 12) | st.tuples(st.integers(0, 12), st.integers(0, 12))


def tensors(seed, n, m, *, b=2, h=2, kv=2, d=4, dtype=f64):
    torch.manual_seed(seed)
    shapes = ((b, h, n, d), (b, kv, m, d), (b, kv, m, d))
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def attend(q, k, v, backend, bucket_sizes=(5, 7), **kwargs):
    torch.manual_seed(99)
    kwargs |= {"q_bucket_size": bucket_sizes[0], "k_bucket_size": bucket_sizes[1]}
    return dot_product_attention(q, k, v, backend=backend, **kwargs)


def with_gradients(q, k, v, cotangent, backend, bucket_sizes=(5, 7), **kwargs):
    out = attend(q, k, v, backend, bucket_sizes, **kwargs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)


def changed(t, index, amount):
    """A copy with other numbers at `index`, big ones, so that the slightest leak shows."""
    copy = t.detach().clone()
    copy[index] = copy[index] * -3 + amount
    return copy.requires_grad_()


@given(seeds, lengths, lengths, buckets, buckets, st.booleans(), windows, st.booleans())
def test_bucket_sizes_change_nothing(seed, n, m, first, second, causal, window, padded):
    q, k, v = tensors(seed, n, m)
    mask = torch.rand(2, m) > 0.3 if padded else None
    cotangent, bias = torch.randn_like(q), LearnedBias(2).double()
    kwargs = {"causal": causal, "window": window, "mask": mask, "attn_bias": bias}
    a = with_gradients(q, k, v, cotangent, "tiled", first, **kwargs)
    b = with_gradients(q, k, v, cotangent, "tiled", second, **kwargs)
    out = reference.attention(q, k, v, **kwargs)
    truth = out, *torch.autograd.grad(out, (q, k, v), cotangent)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), a, b, truth, strict=True):
        reference.assert_close(name, x, y, 1e-11)
        reference.assert_close(name, x, z, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", PATHS)
@given(seed=seeds, n=st.integers(2, 40), extra=st.integers(-6, 12), cut=st.floats(0, 1), dropout=st.booleans())
def test_the_future_is_invisible(backend, dtype, seed, n, extra, cut, dropout):
    """Other future keys and values: outputs and query gradients of the past keep every bit; the future's stay zero."""
    plain = backend == "fused"
    m = n if plain else max(2, n + extra)
    q, k, v = tensors(seed, n, m, dtype=dtype)
    kwargs = {"causal": True, "dropout": 0.3 if dropout and not plain else 0.0}
    t = min(m - 1, max(1, int(cut * m)))  # keys before t are the past
    past = max(0, min(n, t - (m - n)))  # queries that see only these
    cotangent = torch.randn_like(q)
    future = (slice(None), slice(None), slice(t, None))
    k2, v2 = changed(k, future, 50.0), changed(v, future, -70.0)
    a, b = (
        with_gradients(q, k, v, cotangent, backend, **kwargs),
        with_gradients(q, k2, v2, cotangent, backend, **kwargs),
    )
    assert a[0][:, :, :past].equal(b[0][:, :, :past]), "output"
    assert a[1][:, :, :past].equal(b[1][:, :, :past]), "dq"
    cotangent[:, :, past:] = 0
    a, b = (
        with_gradients(q, k, v, cotangent, backend, **kwargs),
        with_gradients(q, k2, v2, cotangent, backend, **kwargs),
    )
    for name, x, y in zip(("dk", "dv"), a[2:], b[2:], strict=True):
        assert not x[future].any(), f"{name}: a gradient reaches the future"
        assert x.equal(y), name


@pytest.mark.parametrize("backend", ["naive", "tiled", "auto"])
@given(seed=seeds, n=st.integers(2, 24), window=windows, documents=st.booleans(), causal=st.booleans())
def test_a_hidden_key_is_invisible(backend, seed, n, window, documents, causal):
    """The same for whatever hides a key: a change to it never reaches, by one bit, a query that may not see it."""
    q, k, v = tensors(seed, n, n, dtype=torch.float32)
    kwargs = {
        "causal": causal,
        "window": window,
        "mask": torch.rand(2, n) > 0.3,
        "document_ids": torch.randint(0, 3, (2, n)).sort(-1).values if documents else None,
    }
    seen = reference.visible(2, 2, n, n, **kwargs)
    j = int(torch.randint(n, ()))
    blind = ~seen[..., j]
    cotangent, index = torch.randn_like(q), (slice(None), slice(None), j)
    a = with_gradients(q, k, v, cotangent, backend, **kwargs)
    b = with_gradients(q, changed(k, index, 30.0), changed(v, index, -40.0), cotangent, backend, **kwargs)
    assert a[0][blind].equal(b[0][blind]), "output"
    assert a[1][blind].equal(b[1][blind]), "dq"


@pytest.mark.parametrize("backend", PATHS)
@given(seed=seeds, n=lengths, m=lengths, causal=st.booleans())
def test_batch_entries_are_independent(backend, seed, n, m, causal):
    m = n if backend == "fused" else m
    exact = backend != "onednn"  # which computes in fp32
    q, k, v = tensors(seed, n, m, b=3, dtype=torch.float64 if exact else torch.float32)
    kwargs = {"causal": causal, "mask": None if backend == "fused" else torch.rand(3, m) > 0.3}
    cotangent = torch.randn_like(q)
    together = with_gradients(q, k, v, cotangent, backend, **kwargs)
    others = [changed(t, slice(1, None), 20.0) for t in (q, k, v)]
    disturbed = with_gradients(*others, cotangent, backend, **kwargs)
    alone = [t[:1].detach().requires_grad_() for t in (q, k, v)]
    if kwargs["mask"] is not None:
        kwargs["mask"] = kwargs["mask"][:1]
    single = with_gradients(*alone, cotangent[:1], backend, **kwargs)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), together, disturbed, single, strict=True):
        assert x[0].equal(y[0]), f"{name}: other entries' numbers changed it"
        reference.assert_close(name, x[:1], z, 1e-11 if exact else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", PATHS)
@given(seed=seeds, n=lengths, m=lengths, causal=st.booleans(), hidden=st.floats(0, 1))
def test_rows_that_see_nothing_are_zero(backend, dtype, seed, n, m, causal, hidden):
    q, k, v = tensors(seed, n, m, dtype=dtype)
    kwargs = {"causal": causal and backend != "fused", "mask": torch.rand(2, m) < hidden}
    cotangent = torch.randn_like(q) * 100
    out, dq, dk, dv = with_gradients(q, k, v, cotangent, backend, **kwargs)
    seen = reference.visible(2, 2, n, m, **kwargs)
    blind, unseen = ~seen.any(-1), ~seen.any(-2)
    assert not out[blind].any()
    assert not dq[blind].any()
    assert not dk[unseen].any()
    assert not dv[unseen].any()
    cotangent = cotangent.masked_fill(~blind[..., None], 0)
    _, *gradients = with_gradients(q, k, v, cotangent, backend, **kwargs)
    assert all(not g.any() for g in gradients), "a row that sees nothing sends no gradient"


# Dropout. Attention over one-hot values returns the dropped probabilities themselves.


def dropped(q, k, p, backend="tiled", bucket_sizes=(16, 32), seed=0, **kwargs):
    one_hot = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:3], k.shape[2])
    torch.manual_seed(seed)
    return dot_product_attention(
        q,
        k,
        one_hot,
        dropout=p,
        backend=backend,
        q_bucket_size=bucket_sizes[0],
        k_bucket_size=bucket_sizes[1],
        **kwargs,
    ).detach()


SERVING_DROPOUT = ["naive", "tiled", "auto"]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("backend", SERVING_DROPOUT)
def test_dropout_keeps_the_rate_and_scales_what_it_keeps(backend, p):
    q, k, _ = tensors(1, 96, 160, dtype=torch.float32)
    probabilities = dropped(q, k, 0.0, backend)
    kept = dropped(q, k, p, backend)
    keep = kept != 0
    torch.testing.assert_close(kept, probabilities * keep / (1 - p), rtol=1e-5, atol=1e-7)
    total = keep.numel()
    sigma = (p * (1 - p) / total) ** 0.5
    assert abs(keep.double().mean().item() - (1 - p)) < 5 * sigma
    # Any one row, column or tile too, else the pattern is not random over positions.
    for axis in (-1, -2):
        rates = keep.double().mean(axis)
        assert (rates - (1 - p)).abs().max() < 6 * (p * (1 - p) / keep.shape[axis]) ** 0.5
    tiles = keep.double().unflatten(-1, (5, 32)).unflatten(-3, (6, 16)).mean((-1, -3))
    assert (tiles - (1 - p)).abs().max() < 5 * (p * (1 - p) / 512) ** 0.5


@pytest.mark.parametrize("backend", SERVING_DROPOUT)
def test_dropout_differs_between_heads_entries_and_tiles(backend):
    """Two masks drawn apart agree in half of the places at p = 0.5; a seed used twice agrees in all."""
    q, k, _ = tensors(1, 64, 64, dtype=torch.float32)
    keep = dropped(q, k, 0.5, backend, (16, 16)) != 0
    parts = keep.unflatten(-1, (4, 16)).unflatten(-3, (4, 16)).permute(0, 1, 2, 4, 3, 5).flatten(0, 3).flatten(1)
    signs = parts.double() * 2 - 1
    correlation = signs @ signs.T / signs.shape[1]
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 256**0.5


@pytest.mark.parametrize("backend", SERVING_DROPOUT)
def test_dropout_follows_the_seed(backend):
    q, k, _ = tensors(1, 40, 40)
    assert dropped(q, k, 0.3, backend, seed=5).equal(dropped(q, k, 0.3, backend, seed=5))
    assert not dropped(q, k, 0.3, backend, seed=5).equal(dropped(q, k, 0.3, backend, seed=6))
    torch.manual_seed(5)
    first, second = (dot_product_attention(q, k, k, dropout=0.3, backend=backend) for _ in range(2))
    assert not first.equal(second), "each call draws anew"


@pytest.mark.parametrize("backend", SERVING_DROPOUT)
def test_dropout_has_the_undropped_attention_as_its_expectation(backend):
    q, k, v = tensors(2, 6, 9, b=1)
    samples = []
    for seed in range(400):
        torch.manual_seed(seed)
        out = dot_product_attention(q, k, v, dropout=0.4, backend=backend, q_bucket_size=4, k_bucket_size=4)
        samples.append(out.detach())
    samples = torch.cat(samples)
    expected = reference.attention(q, k, v).detach()[0]
    deviation = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - expected).abs() < 5 * deviation).all()


@pytest.mark.parametrize("backend", SERVING_DROPOUT)
def test_backward_regenerates_dropout_without_touching_the_generator(backend):
    """Draws made between forward and backward change no gradient, and backward makes none of its own."""
    q, k, v = tensors(3, 20, 20)
    cotangent = torch.randn_like(q)
    _, *undisturbed = with_gradients(q, k, v, cotangent, backend, dropout=0.3)
    out = attend(q, k, v, backend, dropout=0.3)
    torch.manual_seed(7)
    torch.rand(100)
    state = torch.get_rng_state()
    disturbed = torch.autograd.grad(out, (q, k, v), cotangent)
    assert torch.get_rng_state().equal(state)
    for x, y in zip(undisturbed, disturbed, strict=True):
        assert x.equal(y)


def test_without_dropout_the_generator_is_not_touched():
    q, k, v = tensors(3, 20, 20)
    state = torch.get_rng_state()
    dot_product_attention(q, k, v, backend="tiled").sum().backward()
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("backend", ["products", "onednn"])
def test_sequences_that_are_computed_apart_drop_different_weights(backend):
    skip_unless_usable(backend)
    q = torch.randn(1, 1, 1024, 32).expand(2, 1, 1024, 32).contiguous()
    one, other = dot_product_attention(q, q, q, dropout=0.5, backend=backend, k_bucket_size=1024, q_bucket_size=1024)
    assert not torch.allclose(one, other, atol=1e-3)
