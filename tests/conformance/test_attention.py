"""One suite for every backend: outputs and all gradients against the plain definition, for every feature."""

from dataclasses import replace

import pytest
import torch

from memory_efficient_attention_pytorch import AlibiBias, dot_product_attention, select_backend
from tests import reference
from tests.conformance.cases import (
    BACKENDS,
    PATHS,
    Case,
    bias_of,
    by_reference,
    call,
    differentiate,
    keep_mask,
    laid_out,
    make_inputs,
    serve_or_skip,
)

f64, bf16, f16 = torch.float64, torch.bfloat16, torch.float16
EVERYTHING = {
    "mask": "left padding",
    "causal": True,
    "window": (6, 2),
    "documents": True,
    "bias": "module",
    "dropout": 0.3,
    "h": 4,
    "kv": 2,
    "e": 5,
}

LENGTHS = [
    Case("n1", n=1),
    Case("n7", n=7),
    Case("n252", n=252, buckets=(64, 100)),
    Case("n507", n=507, h=1, buckets=(128, 256)),
    Case("n507-default-buckets", n=507, h=1, buckets=(512, 1024)),
    Case("n7-m1", n=7, m=1),
    Case("n1-m7", n=1, m=7),
    Case("n7-m19", n=7, m=19),
    Case("n252-m507", n=252, m=507, h=1, buckets=(64, 100)),
    Case("buckets-of-one", n=7, buckets=(1, 1)),
]
CAUSAL = [
    Case("causal-n1", n=1, causal=True),
    Case("causal-n7", n=7, causal=True),
    Case("causal-n252", n=252, causal=True, buckets=(64, 100)),
    Case("causal-n507", n=507, h=1, causal=True, buckets=(128, 64)),
    Case("causal-decode", n=1, m=507, causal=True, buckets=(128, 64)),
    Case("causal-more-keys", n=7, m=19, causal=True),
    Case("causal-more-queries", n=19, m=7, causal=True),
    Case("causal-m1", n=7, m=1, causal=True),
]
MASKS = [
    Case("mask-right-padding", n=13, mask="right padding"),
    Case("mask-left-padding-causal", n=13, mask="left padding", causal=True, b=3),
    Case("mask-one-row-hidden", n=13, m=11, mask="one row all hidden"),
    Case("mask-everything-hidden", n=13, m=11, mask="everything hidden"),
    Case("mask-per-head", n=13, m=11, mask="1hnm"),
    Case("mask-bhnm-causal", n=13, m=19, mask="bhnm", causal=True),
    Case("mask-11nm", n=13, m=11, mask="11nm"),
    Case("mask-b11m", n=13, m=11, mask="b11m"),
    Case("mask-b1n1", n=13, m=11, mask="b1n1"),
    Case("mask-hnm", n=13, m=11, mask="hnm", h=3),
    Case("mask-sparse", n=13, m=11, mask="sparse bhnm"),
    Case("mask-heads-gqa", n=13, m=11, mask="1hnm", h=4, kv=2),
]
WINDOWS = [
    Case("window-3", n=19, window=3),
    Case("window-0", n=19, window=0),
    Case("window-left", n=19, window=(4, 0)),
    Case("window-right", n=19, window=(0, 5)),
    Case("window-wider-than-all", n=19, window=1000),
    Case("window-causal", n=19, window=4, causal=True),
    Case("window-causal-252", n=252, window=20, causal=True, buckets=(16, 32)),
    Case("window-more-keys", n=7, m=19, window=(5, 2)),
    Case("window-more-queries", n=19, m=7, window=(2, 3)),
    Case("window-padding", n=19, window=(3, 1), mask="left padding"),
    Case("window-decode", n=1, m=40, window=8, causal=True),
]
DOCUMENTS = [
    Case("documents", n=19, documents=True),
    Case("documents-causal", n=19, documents=True, causal=True),
    Case("documents-252", n=252, documents=True, causal=True, buckets=(16, 32)),
    Case("documents-window-padding", n=19, documents=True, window=(3, 3), mask="right padding"),
]
BIASES = [
    *(Case(f"bias-{shape}", n=9, m=11, bias=shape) for shape in ("bhnm", "1hnm", "b1nm", "11nm", "bh1m", "bhn1")),
    *(Case(f"bias-{shape}", n=9, m=11, bias=shape) for shape in ("1h1m", "1hn1", "111m", "1111", "hnm", "nm", "m")),
    Case("bias-fixed", n=9, m=11, bias="1hnm", bias_grad=False),
    Case("bias-fixed-causal", n=11, bias="1hnm", bias_grad=False, causal=True),
    Case("bias-causal-padding", n=13, bias="1hnm", causal=True, mask="left padding"),
    Case("bias-key-causal", n=13, m=15, bias="b11m", causal=True),
    Case("bias-gqa", n=9, m=11, bias="1hnm", h=4, kv=2),
    Case("bias-gqa-shared", n=9, m=11, bias="b1nm", h=4, kv=1),
    Case("bias-window", n=19, bias="1hnm", window=(3, 2)),
    Case("bias-module", n=9, m=11, bias="module"),
    Case("bias-module-causal", n=9, m=15, bias="module", causal=True),
    Case("bias-module-more-queries", n=15, m=9, bias="module"),
    Case("bias-module-gqa-padding", n=13, bias="module", h=4, kv=2, mask="right padding"),
    Case("bias-module-252", n=252, bias="module", causal=True, buckets=(64, 100)),
]
DROPOUTS = [
    Case("dropout", n=13, m=11, dropout=0.3),
    Case("dropout-causal", n=13, dropout=0.3, causal=True),
    Case("dropout-padding", n=13, dropout=0.5, mask="one row all hidden"),
    Case("dropout-gqa", n=13, m=11, dropout=0.3, h=4, kv=2),
    Case("dropout-bias", n=13, m=11, dropout=0.3, bias="1hnm"),
    Case("dropout-bias-module", n=13, m=11, dropout=0.3, bias="module"),
    Case("dropout-high", n=13, m=11, dropout=0.95),
    Case("dropout-252", n=252, dropout=0.1, causal=True, window=40, buckets=(64, 100)),
]
HEADS_AND_WIDTHS = [
    Case("gqa", n=13, m=11, h=4, kv=2),
    Case("gqa-causal", n=13, h=6, kv=2, causal=True),
    Case("mqa", n=13, m=11, h=4, kv=1),
    Case("mqa-padding", n=13, m=11, h=4, kv=1, mask="right padding"),
    Case("value-narrower", n=13, m=11, d=8, e=5),
    Case("value-wider", n=13, m=11, d=8, e=16, causal=True),
    Case("value-one", n=13, m=11, d=8, e=1),
    Case("width-one", n=13, m=11, d=1),
    Case("width-odd", n=13, m=11, d=7, causal=True),
    Case("scale", n=13, m=11, scale=0.3),
    Case("scale-causal", n=13, m=13, scale=1.0, causal=True),
    Case("scale-zero", n=13, m=11, scale=0.0),
]
LAYOUTS = [
    Case("layout-transposed", n=13, m=11, layout="transposed"),
    Case("layout-strided", n=13, m=11, layout="strided"),
    Case("layout-strided-causal", n=13, m=11, layout="strided", causal=True),
    Case("layout-strided-causal-bf16", n=13, layout="strided", causal=True, dtype=bf16),
    Case("layout-expanded", n=13, m=11, layout="expanded", mask="right padding"),
    Case("layout-transposed-everything", n=19, layout="transposed", **EVERYTHING),
]
PRECISIONS = [
    *(Case(f"{dtype}-plain"[6:], n=65, dtype=dtype, buckets=(16, 32)) for dtype in (f64, bf16, f16)),
    *(Case(f"{dtype}-causal"[6:], n=65, dtype=dtype, causal=True, buckets=(16, 32)) for dtype in (f64, bf16, f16)),
    *(Case(f"{dtype}-padding"[6:], n=33, dtype=dtype, mask="right padding") for dtype in (f64, bf16, f16)),
    *(Case(f"{dtype}-bias"[6:], n=33, dtype=dtype, bias="1hnm") for dtype in (f64, bf16, f16)),
    *(Case(f"{dtype}-everything"[6:], n=33, dtype=dtype, **EVERYTHING) for dtype in (f64, bf16, f16)),
    Case("everything", n=33, **EVERYTHING),
    Case("everything-tensor-bias", n=33, **EVERYTHING | {"bias": "b1nm"}),
    Case("everything-252", n=252, buckets=(64, 100), **EVERYTHING),
]
ALL = [*(LENGTHS + CAUSAL + MASKS + WINDOWS + DOCUMENTS + BIASES + DROPOUTS + HEADS_AND_WIDTHS + LAYOUTS + PRECISIONS)]


def test_case_names_are_unique():
    assert len({case.name for case in ALL}) == len(ALL)


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", PATHS)
def test_outputs_and_gradients(backend, case):
    inputs = make_inputs(case)
    keep = serve_or_skip(backend, lambda: keep_mask(inputs, backend, case.buckets))
    ours = differentiate(inputs, serve_or_skip(backend, lambda: call(inputs, backend, case.buckets)))
    naive, truth = by_reference(inputs, keep), by_reference(inputs.to(f64), keep)
    assert ours["out"].dtype == case.dtype
    for name in truth:
        # A bias module's gradient comes rounded to its parameters' dtype: of each tile, and here of each sequence.
        rounded = (backend, case.dtype, name) == ("onednn", torch.bfloat16, "dbias.weight")
        slack = 3.0 if rounded else 1.0
        reference.assert_as_accurate(f"{case} {name}", ours[name], naive[name], truth[name], slack=slack)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_choice_agrees_with_what_runs(case):
    """select_backend names the backend that auto runs; what an explicit choice refuses is ruled out, with a reason."""
    inputs = make_inputs(case)
    q, k, v = (inputs.leaves[name] for name in "qkv")
    choice = select_backend(q, k, v, attn_bias=bias_of(inputs), **inputs.fixed)
    assert choice.name in ("naive", "tiled", "fused")
    assert choice.reason
    assert choice.name not in choice.ruled_out
    assert all(choice.ruled_out.values()), "each with its reason"
    try:
        call(inputs, "fused", case.buckets)
    except (NotImplementedError, ValueError):
        assert "fused" in choice.ruled_out
    assert call(inputs, choice.name, case.buckets).equal(call(inputs, "auto", case.buckets))


@pytest.mark.parametrize(
    "case", [c for c in ALL if c.name in ("n252", "causal-n252", "mask-right-padding", "gqa", "float64-plain")], ids=str
)
def test_fused_serves_what_the_fused_kernel_computes(case):
    inputs = make_inputs(case)
    assert call(inputs, "fused", case.buckets).shape == (case.b, case.h, case.n, case.e or case.d)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "bias.weight"])
@pytest.mark.parametrize("backend", PATHS)
def test_a_single_gradient(backend, wanted):
    """Any one input may be the only one that needs a gradient."""
    bias = {"bias": "1hnm", "bias.weight": "module"}.get(wanted)
    case = Case(f"only-{wanted}", n=13, m=11, causal=True, bias=bias, mask="right padding")
    inputs = make_inputs(case)
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(name == wanted)
    ours = differentiate(inputs, serve_or_skip(backend, lambda: call(inputs, backend, case.buckets)))
    naive, truth = by_reference(inputs), by_reference(inputs.to(f64))
    assert set(ours) == {"out", f"d{wanted}"}
    for name in truth:
        reference.assert_as_accurate(name, ours[name], naive[name], truth[name])


@pytest.mark.parametrize("backend", PATHS)
def test_no_gradient_wanted_and_backward_of_zero_cotangent(backend):
    case = Case("no-gradient", n=13, causal=True)
    inputs = make_inputs(case)
    with torch.no_grad():
        out = call(inputs, backend, case.buckets)
    assert not out.requires_grad
    assert out.equal(call(inputs, backend, case.buckets).detach())
    grads = torch.autograd.grad(
        call(inputs, backend, case.buckets), list(inputs.leaves.values()), torch.zeros_like(out)
    )
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("kwargs", [{}, {"causal": True}, {"dropout": 0.2}, {"mask": torch.ones(0, 5) > 0}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, kwargs):
    q, k, v = (torch.randn(0, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    out = serve_or_skip(backend, lambda: dot_product_attention(q, k, v, backend=backend, **kwargs))
    assert out.shape == (0, 4, 5, 8)
    for leaf, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == leaf.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_beside_a_bias(backend):
    q = torch.randn(1, 2, 0, 8, requires_grad=True)
    out = serve_or_skip(backend, lambda: dot_product_attention(q, q, q, attn_bias=AlibiBias(2), backend=backend))
    assert out.shape == (1, 2, 0, 8)
    q = torch.randn(1, 2, 3, 8)
    out = serve_or_skip(
        backend, lambda: dot_product_attention(q, q[:, :, :0], q[:, :, :0], attn_bias=AlibiBias(2), backend=backend)
    )
    assert out.equal(torch.zeros(1, 2, 3, 8))


LSE_CASES = ["n7-m19", "causal-more-queries", "mask-right-padding", "bias-module-causal", "dropout-causal", "gqa"]


@pytest.mark.parametrize(
    "case", [c for c in ALL if c.name in (*LSE_CASES, "float64-plain", "bfloat16-causal", "everything")], ids=str
)
@pytest.mark.parametrize("backend", PATHS)
def test_log_sum_exp(backend, case):
    """return_lse adds the log of the softmax's denominator, fp32 or better, -inf for a row that sees nothing."""
    inputs = make_inputs(case)
    out, lse = serve_or_skip(backend, lambda: call(inputs, backend, case.buckets, return_lse=True))
    alone = call(inputs, backend, case.buckets)
    # Auto may choose another backend when the log-sum-exp is asked for; an explicit one stays what it is.
    reference.assert_close("out", out, alone, 2 * reference.EPSILON[case.dtype] if backend == "auto" else 0.0)
    double = inputs.to(f64)
    kwargs = {name: value for name, value in double.fixed.items() if name != "dropout"} | {"attn_bias": bias_of(double)}
    truth = reference.log_sum_exp(double.leaves["q"], double.leaves["k"], **kwargs)
    assert lse.shape == (case.b, case.h, case.n)
    assert lse.dtype == (f64 if case.dtype == f64 else torch.float32)
    assert (lse == -torch.inf).equal(truth == -torch.inf)
    # PyTorch's fused kernel uses a faster exponential in half precision: 1e-3, a quarter of bf16's own rounding.
    tolerance = {f64: 1e-10, torch.float32: 1e-5}.get(case.dtype, 1e-3)
    torch.testing.assert_close(lse.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", PATHS)
def test_log_sum_exp_has_its_gradient_or_none(backend):
    """Whoever differentiates the log-sum-exp gets its exact gradient, or is told that there is none; never a zero."""
    case = Case("lse-gradient", n=9, m=13, dtype=f64, causal=True)
    inputs = make_inputs(case)
    out, lse = serve_or_skip(backend, lambda: call(inputs, backend, case.buckets, return_lse=True))
    if not lse.requires_grad:
        return
    cotangent = torch.randn_like(lse)
    q, k, v = (inputs.leaves[name] for name in "qkv")
    ours = torch.autograd.grad([out, lse], [q, k, v], [inputs.cotangent, cotangent])
    true_outputs = [reference.attention(q, k, v, causal=True), reference.log_sum_exp(q, k, causal=True)]
    truth = torch.autograd.grad(true_outputs, [q, k, v], [inputs.cotangent, cotangent])
    for name, mine, true in zip("qkv", ours, truth, strict=True):
        reference.assert_close(f"d{name}", mine, true, 1e-10)


AUTOCAST = ["n252", "causal-n252", "mask-left-padding-causal", "bias-1hnm", "dropout-causal", "everything", "gqa"]


@pytest.mark.parametrize("case", [c for c in ALL if c.name in AUTOCAST], ids=str)
@pytest.mark.parametrize("backend", PATHS)
def test_autocast(backend, case):
    """fp32 inputs are cast, as by F.scaled_dot_product_attention; no more is lost than by a plain bf16 path."""
    inputs = make_inputs(case)
    with torch.autocast("cpu", dtype=bf16):
        keep = serve_or_skip(backend, lambda: keep_mask(inputs, backend, case.buckets))
        out = serve_or_skip(backend, lambda: call(inputs, backend, case.buckets))
    assert out.dtype == bf16, "the dtype of v as autocast casts it"
    ours, truth = differentiate(inputs, out), by_reference(inputs.to(f64), keep)
    rounded = inputs.to(bf16)
    naive = by_reference(rounded, keep)
    for name in truth:
        reference.assert_as_accurate(f"{case} {name}", ours[name], naive[name], truth[name])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", PATHS)
def test_large_scores(backend, causal):
    """Scores near a thousand, far beyond exp's range: outputs as exact as such scores allow, gradients finite."""
    inputs = make_inputs(Case("large-scores", n=33, magnitude=20.0, causal=causal))
    ours = differentiate(inputs, call(inputs, backend, (8, 8)))
    truth = by_reference(inputs.to(f64))
    # Two scores of size s, each off by s eps, are what the exponential of their difference is taken of.
    reference.assert_close("out", ours["out"], truth["out"], 1000 * 4 * torch.finfo(torch.float32).eps)
    for name in ("dq", "dk", "dv"):
        assert torch.linalg.vector_norm(ours[name] - truth[name]) <= 1e-2 * torch.linalg.vector_norm(truth[name])


@pytest.mark.parametrize("dtype", [bf16, f16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bias", [None, "111m", "module"])
@pytest.mark.parametrize("backend", ["tiled", "onednn", "auto"])
def test_accumulators_are_wider_than_half_precision(backend, bias, dtype):
    """Sums over a thousand tiles lose no more than a single product does, for every gradient."""
    case = Case("many-tiles", n=256, b=1, h=1, bias=bias, dtype=dtype, buckets=(8, 8))
    inputs = make_inputs(case)
    inputs.cotangent = inputs.cotangent.abs()  # all of one sign, so that sums grow instead of cancelling
    if inputs.module is not None:
        inputs.module = Ramp(dtype)
    ours = differentiate(inputs, call(inputs, backend, case.buckets))
    truth = by_reference(inputs.to(f64))
    for name in truth:
        error = (ours[name].double() - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= 4 * torch.finfo(dtype).eps, f"{name}: relative error {error:.1e}"


class Ramp(torch.nn.Module):
    """A bias that grows with the key's position, learned slope: its gradient is one sum over all scores."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, query_positions, key_positions):
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return weight * (key_positions[None, :] / 256 + 0 * query_positions[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_of_a_whole_layer(backend):
    """bf16 projections from autocast go in, fp32 parameters receive their gradient."""
    torch.manual_seed(3)
    x, weight = torch.randn(2, 33, 16), torch.randn(3, 16, 16, requires_grad=True)

    def layer(attend, x, weight):
        return attend(*(reference.split_heads(torch.nn.functional.linear(x, w), 2) for w in weight)).float().square()

    with torch.autocast("cpu", dtype=bf16):
        out = layer(
            lambda q, k, v: dot_product_attention(
                q, k, v, causal=True, backend=backend, q_bucket_size=8, k_bucket_size=8
            ),
            x,
            weight,
        )
        naive = layer(lambda q, k, v: reference.attention(q, k, v, causal=True), x, weight)
    double = weight.detach().double().requires_grad_()
    truth = layer(lambda q, k, v: reference.attention(q, k, v, causal=True).double(), x.double(), double)
    grads = [torch.autograd.grad(o.mean(), w)[0] for o, w in ((out, weight), (naive, weight), (truth, double))]
    assert grads[0].dtype == torch.float32
    assert torch.linalg.vector_norm(grads[0] - grads[2]) <= 1.1 * torch.linalg.vector_norm(grads[1] - grads[2])


@pytest.mark.parametrize("backend", PATHS)
def test_minus_infinity_in_a_bias_hides_like_a_mask(backend):
    """A float mask works as a bias: -inf hides a key, a row of -inf gives output 0 and gradient 0, never NaN."""
    case = Case("infinite-bias", n=13, m=11)
    inputs = make_inputs(case)
    mask = torch.rand(2, 1, 13, 11) > 0.5
    mask[0, 0, 4] = False
    float_mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    out = serve_or_skip(backend, lambda: call(inputs, backend, case.buckets, attn_bias=float_mask))
    ours = differentiate(inputs, out)
    inputs.fixed["mask"] = mask
    naive, truth = by_reference(inputs), by_reference(inputs.to(f64))
    assert not ours["out"][0, :, 4].any()
    for name in truth:
        reference.assert_as_accurate(name, ours[name], naive[name], truth[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [{"causal": True}, {"window": 6, "causal": True}, {"bias": "module"}], ids=str)
def test_decoding_one_by_one_equals_the_full_pass(backend, kwargs):
    """What end alignment is for: the last query alone, against all keys so far, is the last row of the full pass."""
    case = Case("decode", n=17, dtype=f64, **{"causal": True} | kwargs)
    inputs = make_inputs(case)
    full = serve_or_skip(backend, lambda: call(inputs, backend, case.buckets))
    q, k, v = (inputs.leaves[name] for name in "qkv")
    kwargs = {"causal": True, "window": case.window, "attn_bias": inputs.module, "backend": backend}
    for t in (1, 8, 17):
        step = dot_product_attention(q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t], **kwargs)
        torch.testing.assert_close(step, full[:, :, t - 1 : t], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["transposed", "strided", "scalar"])
@pytest.mark.parametrize(
    "case", [c for c in ALL if c.name in ("n7-m19", "causal-n7", "window-causal", "dropout")], ids=str
)
@pytest.mark.parametrize("backend", PATHS)
def test_cotangents_of_any_layout(backend, case, layout):
    """As they arrive from a transposition, a slice, or a sum (one number expanded)."""
    inputs = make_inputs(case)
    keep = serve_or_skip(backend, lambda: keep_mask(inputs, backend, case.buckets))
    one = torch.tensor(0.7).expand_as(inputs.cotangent)
    inputs.cotangent = one if layout == "scalar" else laid_out(inputs.cotangent, layout)
    ours = differentiate(inputs, serve_or_skip(backend, lambda: call(inputs, backend, case.buckets)))
    naive, truth = by_reference(inputs, keep), by_reference(inputs.to(f64), keep)
    for name in truth:
        reference.assert_as_accurate(f"{case} {name}", ours[name], naive[name], truth[name])


@pytest.mark.parametrize("backend", PATHS)
def test_inputs_are_left_alone(backend):
    case = Case("untouched", n=13, mask="right padding", causal=True, bias="1hnm")
    inputs = make_inputs(replace(case, bias_grad=False))
    before = {name: leaf.detach().clone() for name, leaf in inputs.leaves.items()}
    mask, cotangent = inputs.fixed["mask"].clone(), inputs.cotangent.clone()
    out = serve_or_skip(backend, lambda: call(inputs, backend, case.buckets))
    kept = out.detach().clone()
    differentiate(inputs, out)
    assert all(leaf.equal(before[name]) for name, leaf in inputs.leaves.items())
    assert mask.equal(inputs.fixed["mask"])
    assert cotangent.equal(inputs.cotangent)
    assert kept.equal(out), "backward does not write into the output"
