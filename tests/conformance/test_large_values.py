"""Inputs near the end of what fp32 holds: rows of huge biases, huge scores, huge hidden keys and values; and inputs
whose rows share memory. Held to fp64."""

import pytest
import torch

from memory_efficient_attention_pytorch import AlibiBias, dot_product_attention, select_backend
from tests import reference
from tests.agreement import assert_same, difference, gradients, skip_unless_usable

LEAST = torch.finfo(torch.float32).min
WAYS = ("naive", "products", "cpu_kernel", "onednn", "sdpa", "cpu", "auto", "tiled")


def results(attend, *tensors, **kwargs):
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = attend(*tensors, **kwargs)
    return [out.detach(), *gradients(out, tensors)]


def truth(*tensors, attn_bias=None, **kwargs):
    bias = None if attn_bias is None else attn_bias.double()
    return results(reference.attention, *(t.double().contiguous() for t in tensors), attn_bias=bias, **kwargs)


def assert_right(ours, exact, tolerance=3e-6):
    for mine, true in zip(ours, exact, strict=True):
        assert torch.isfinite(mine).all()
        assert difference(mine, true) <= tolerance


def heads(n, m=None, d=32, seed=0):
    torch.manual_seed(seed)
    m = n if m is None else m
    return torch.randn(1, 2, n, d), torch.randn(1, 2, m, d), torch.randn(1, 2, m, d)


def bias_of(height, n, m):
    """One that is huge over whole rows, differs between keys a little, and is broadcast over the heads."""
    bias = torch.randn(1, 1, n, m)
    bias[:, :, n // 4 : n // 2] = height
    return bias


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("height", [8e6, -1e9, -1e12, -1e20, -1e30, LEAST])
@pytest.mark.parametrize(("n", "m"), [(96, 160), (512, 1024)])
def test_a_huge_bias_over_a_whole_row(way, height, n, m):
    q, k, v = heads(n, m)
    arguments = {"attn_bias": bias_of(height, n, m), "q_bucket_size": 512, "k_bucket_size": 512}
    if abs(height) >= 1e20 and way in ("sdpa", "cpu"):
        # There fp64 rounds the scores away, which the kernels do not.
        with pytest.raises(NotImplementedError, match="its scores count as equal"):
            dot_product_attention(q, k, v, backend=way, **arguments)
        return
    ours = results(dot_product_attention, q, k, v, backend=way, **arguments)
    assert_right(ours, truth(q, k, v, attn_bias=arguments["attn_bias"]), 2e-4 if height == -1e12 else 3e-6)


@pytest.mark.parametrize("height", [-1e9, -1e30, LEAST])
@pytest.mark.parametrize("arguments", [{"causal": True}, {"window": 70, "k_bucket_size": 64}, {"n_of_loss": 20}])
def test_the_gradient_of_a_huge_bias_and_what_else_is_hidden(height, arguments):
    q, k, v = heads(128)
    bias = bias_of(height, 128, 128)
    arguments = dict(arguments)
    rows = arguments.pop("n_of_loss", None)
    kept = {name: value for name, value in arguments.items() if name != "k_bucket_size"}

    def ours(q, k, v, bias):
        return dot_product_attention(q, k, v, attn_bias=bias, **arguments)[:, :, :rows]

    def exact(q, k, v, bias):
        return reference.attention(q, k, v, attn_bias=bias, **kept)[:, :, :rows]

    assert_right(results(ours, q, k, v, bias), results(exact, *(t.double() for t in (q, k, v, bias))))


@pytest.mark.parametrize("way", ["products", "cpu_kernel", "onednn"])
def test_a_module_of_huge_biases_and_its_log_sum_exp(way):
    q, k, v = heads(512, 1024)

    def module(queries, keys):
        return torch.where(queries[:, None] > 700, -1e9, (queries[:, None] - keys).abs() * -0.25)

    ours, lse = dot_product_attention(q, k, v, attn_bias=module, backend=way, return_lse=True)
    exact = [t.double() for t in (q, k, v)]
    bias = module(torch.arange(512, 1024).double(), torch.arange(1024).double())
    assert_right([ours], [reference.attention(*exact, attn_bias=bias)])
    assert difference(lse, reference.log_sum_exp(*exact[:2], attn_bias=bias)) <= 1e-7
    assert_right(results(dot_product_attention, q, k, v, attn_bias=module, backend=way), truth(q, k, v, attn_bias=bias))


@pytest.mark.parametrize("backend", ["auto", "tiled", "naive"])
@pytest.mark.parametrize("height", [7e4, 8e6, 1e8])
@pytest.mark.parametrize("n", [4, 700])
def test_large_scores_beside_a_bias(backend, height, n):
    """Equal scores, so that the bias alone decides, and not what fp32 rounds away of the log-sum-exp."""
    q = torch.full((1, 2, n, 32), (height / 32**0.5) ** 0.5)
    v = torch.randn(1, 2, n, 32)
    for bias in (torch.full((2, n, n), 0.3), AlibiBias(2)):
        values = bias if isinstance(bias, torch.Tensor) else bias(torch.arange(n), torch.arange(n))
        seen = v.clone().requires_grad_()
        out = dot_product_attention(q, q, seen, attn_bias=bias, causal=True, backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), seen)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        weights = values.double().masked_fill(hidden, float("-inf")).softmax(-1)
        assert difference(grad.sum(2), weights.sum((1, 2))[:, None].expand(2, 32)[None]) < 1e-5
        if isinstance(bias, torch.Tensor):
            assert_right(
                [out, grad], [weights @ v.double(), weights.sum(1)[None, :, :, None].expand(1, 2, n, 32)], 1e-5
            )


@pytest.mark.parametrize("backend", ["auto", "tiled", "naive"])
@pytest.mark.parametrize("n", [96, 1536])
def test_scores_of_millions(backend, n):
    q, k, v = heads(n)
    # Exact in fp32: a multiple of 2²³, and 0 or 1 beside it.
    q[..., 1:], k[..., 1:] = 0.0, 0.0
    q[..., 0], k[..., 0] = 2048.0, 4096.0 - 4096.0 * (torch.arange(n) % 5 == 0)
    q[..., 1], k[..., 1] = 1.0, (torch.arange(n) % 3).float()
    out, grad_q, grad_k, grad_v = results(dot_product_attention, q, k, v, scale=1.0, backend=backend)
    exact = truth(q, k, v, scale=1.0)
    assert_right((out, grad_k, grad_v), (exact[0], *exact[2:]))
    # Differences of 4096 times nearly the same: what the inputs' own rounding leaves of them.
    assert difference(grad_q, exact[1]) <= 1e-2
    if n > 1000 and backend == "auto":
        assert "65536" in select_backend(q, k, v, scale=1.0).ruled_out["fused"]


HIDDEN = {
    "padding": ({"mask": (torch.arange(300) < 200)[None]}, slice(None)),
    "documents": ({"document_ids": (torch.arange(300) >= 200).int()[None]}, slice(0, 200)),
    "causal": ({"causal": True}, slice(0, 200)),
    "window": ({"window": (30, 0)}, slice(0, 200)),
}


@pytest.mark.parametrize("backend", ["auto", "tiled", "naive"])
@pytest.mark.parametrize("what", HIDDEN)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_hidden_finite_values_reach_nothing(backend, what, dropout):
    arguments, rows = HIDDEN[what]
    q, k, v = heads(300, seed=1)
    q = q[:, :, rows]
    n = q.shape[2]
    if n < 300 and what != "documents":
        arguments = {"mask": reference.visible(1, 1, 300, 300, **arguments)[:, :, :200]}
    if what == "documents":
        arguments = {"mask": (torch.arange(300) < 200)[None, None, None].expand(1, 1, n, 300)}

    def of(k, v):
        torch.manual_seed(3)
        options = {"dropout": dropout, "k_bucket_size": 128, "backend": backend}
        return results(dot_product_attention, q, k, v, **arguments, **options)

    huge_k, huge_v = k.clone(), v.clone()
    huge_k[:, :, 200:], huge_v[:, :, 200:] = 1e38, -3e38
    assert_right(of(huge_k, huge_v), of(k, v))


def test_documents_hide_finite_values_within_a_tile():
    q, k, v = heads(300, seed=2)
    ids = (torch.arange(300) >= 200).int()[None]
    huge_v = v.clone()
    huge_v[:, :, 200:] = 3e38

    def of(v):
        def attend(q, k, v):
            return dot_product_attention(q, k, v, document_ids=ids)[:, :, :200]

        return [x[:, :, :200] for x in results(attend, q, k, v)]

    assert_right(of(huge_v), of(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [0, 1, 8])
def test_rows_that_share_memory(way, step, dtype):
    torch.manual_seed(4)
    n, d = 512, 32
    values = torch.randn(3, 2, 2, (n - 1) * step + d).to(dtype)
    q, k, v = (x.as_strided((2, 2, n, d), (x.stride(0), x.stride(1), step, 1), x.storage_offset()) for x in values)
    k = torch.cat((k[:, :, :-5], torch.randn(2, 2, 5, d).to(dtype)), dim=2) if step == 0 else k
    for arguments in ({}, {"causal": True}, {"causal": True, "window": 50}):
        try:
            ours = results(dot_product_attention, q, k, v, backend=way, **arguments)
        except NotImplementedError:
            continue
        copies = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
        expected = results(dot_product_attention, *copies, backend=way, **arguments)
        assert_same(ours, expected, 1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("way", WAYS)
def test_a_huge_bias_of_what_a_query_sees(way):
    """Only what causality leaves counts, for each row by itself: other rows and sequences change nothing."""
    n = 600
    q, k, v = torch.randn(3, 2, 1, n, 32).unbind()
    bias = torch.zeros(2, 1, n, n)
    bias[0, :, :, :300] = LEAST  # the first 300 queries see nothing else
    other = bias.clone()
    other[1, :, 5] = LEAST
    try:
        ours, others = (
            results(dot_product_attention, q, k, v, attn_bias=x, causal=True, backend=way) for x in (bias, other)
        )
    except NotImplementedError:
        assert way in ("sdpa", "cpu")
        return
    assert_right(ours, truth(q, k, v, attn_bias=bias, causal=True))
    assert_same([x[0] for x in ours], [x[0] for x in others], 0.0)


@pytest.mark.parametrize("way", ["naive", "products", "cpu_kernel", "onednn", "auto"])
def test_a_module_of_biases_beside_which_scores_are_equal(way):
    q, k, v = heads(300, seed=4)

    def module(queries, keys):
        near = (queries[:, None] - keys).abs() * -0.25
        return torch.where(queries[:, None] < 100, torch.full_like(near, -1e30), near)

    at = torch.arange(300).double()
    ours = results(dot_product_attention, q, k, v, attn_bias=module, backend=way, k_bucket_size=128)
    assert_right(ours, truth(q, k, v, attn_bias=module(at, at)))


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"window": 5}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_heads_or_sequences_that_are_windows_of_a_signal(way, arguments):
    """Neighbours begin one number apart, which PyTorch's CPU kernel reads and writes elsewhere."""
    features, signal = torch.randn(1, 64, 33), torch.randn(64 * 32 + 3)
    for windows in (features.unfold(-1, 32, 1).transpose(1, 2), signal.as_strided((4, 1, 64, 32), (1, 64 * 32, 32, 1))):
        q, (k, v) = windows, torch.randn(2, *windows.shape)
        try:
            ours = dot_product_attention(q, k, v, backend=way, **arguments)
        except NotImplementedError:
            continue
        assert_right([ours], [reference.attention(*(x.double().contiguous() for x in (q, k, v)), **arguments)])


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (1, 1, 40, 1)])
@pytest.mark.parametrize("backend", ["auto", "tiled", "naive", "fused"])
def test_a_learned_scale_has_its_gradient(shape, backend):
    q, k, v = heads(40)
    scale = torch.rand(shape) + 0.1
    ours = results(lambda q, k, v, s: dot_product_attention(q, k, v, scale=s, backend=backend), q, k, v, scale)
    exact = results(
        lambda q, k, v, s: reference.attention(q * s, k, v, scale=1.0), *(t.double() for t in (q, k, v, scale))
    )
    assert_right(ours, exact)


def test_a_scale_that_does_not_fit():
    q, k, v = heads(8)
    with pytest.raises(ValueError, match="scale: expected"):
        dot_product_attention(q, k, v, scale=torch.ones(8, 8))
    with pytest.raises(ValueError, match="scale: expected"):
        dot_product_attention(q, k, v, scale=torch.tensor(1))


def test_dropout_under_another_default_device():
    q, k, v = heads(40)
    torch.manual_seed(5)
    expected = dot_product_attention(q, k, v, dropout=0.5)
    torch.manual_seed(5)
    with torch.device("meta"):
        ours = dot_product_attention(q, k, v, dropout=0.5)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_documents_of_every_integer_dtype(dtype):
    q, k, v = heads(96)
    ids = (torch.arange(96) // 40)[None]
    expected = dot_product_attention(q, k, v, document_ids=ids, k_bucket_size=32)
    assert torch.equal(dot_product_attention(q, k, v, document_ids=ids.to(dtype), k_bucket_size=32), expected)


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_large_scores_of_either_sign_of_scale(scale):
    skip_unless_usable("onednn")
    q, k, v = (torch.randn(1, 2, 128, 32) for _ in range(3))
    assert select_backend(q * 1e2, k * 1e2, v, scale=scale).way == "products"
    with pytest.raises(NotImplementedError, match="may exceed 65536"):
        dot_product_attention(q * 1e2, k * 1e2, v, scale=scale, backend="onednn")


def test_what_scores_can_be_is_found_of_either_sign_of_scale():
    """By the norms, where the largest values alone do not decide."""
    q, k, v = (torch.zeros(1, 1, 9, 64) for _ in range(3))
    q[..., 0], k[..., 0] = 2000.0, 50.0  # scores of 1e5 * scale; the first bound is 64 times that
    for scale, way in ((-0.1, "sdpa"), (-1.0, "products")):
        assert select_backend(q, k, v, scale=scale).way == way
