"""What is decided about a request, once: which way computes it, and that the same way serves it to the end."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from memory_efficient_attention_pytorch import AlibiBias, RelativePositionBias, dot_product_attention, select_backend
from memory_efficient_attention_pytorch.attention import sdpa
from memory_efficient_attention_pytorch.attention.cpu_kernel import unit_stride
from memory_efficient_attention_pytorch.attention.decision import WAYS, decide
from memory_efficient_attention_pytorch.attention.request import build_request
from memory_efficient_attention_pytorch.attention.sdpa import not_whole, whole_mask
from memory_efficient_attention_pytorch.attention.whole_kernels import laid_out
from tests import reference
from tests.agreement import assert_same, gradients, skip_unless_usable
from tests.memory.live_bytes import LiveBytes

NAMES = [way.name for way in WAYS]
ON_A_CPU = [name for name in NAMES if name not in ("flash", "efficient", "cuda_kernel")]


def qkv(n=9, m=None, h=4, kv=2, d=8, dtype=torch.float32):
    shapes = ((2, h, n, d), (2, kv, m or n, d), (2, kv, m or n, d))
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


def test_every_way_has_a_name_of_its_own():
    assert len(set(NAMES)) == len(NAMES)
    assert {way.backend for way in WAYS} == {"naive", "tiled", "fused"}


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_way_asked_for_by_name_computes_the_same(name):
    q, k, v = qkv()
    choice = select_backend(q, k, v, causal=True, backend=name)
    assert (choice.way, choice.reason) == (name, "asked for")
    out = dot_product_attention(q, k, v, causal=True, backend=name)
    truth = reference.attention(q.double(), k.double(), v.double(), causal=True)
    reference.assert_close("out", out, truth, 1e-6)
    for mine, true in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, truth)), strict=True):
        reference.assert_close("gradient", mine, true, 1e-5)


TRANSFORMED = {
    "window": {"window": 3},
    "ALiBi": {"attn_bias": AlibiBias(4)},
    "tensor": {"causal": True, "attn_bias": torch.randn(4, 9, 9)},
}


@pytest.mark.parametrize("kwargs", TRANSFORMED.values(), ids=TRANSFORMED)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_under_a_transform_what_autograd_differentiates_computes(kwargs):
    """torch.func's transforms do not go into an autograd Function of ours."""
    q, k, v = (x.detach() for x in qkv())

    def loss(q):
        return dot_product_attention(q, k, v, **kwargs).square().sum()

    leaf = q.clone().requires_grad_()
    (truth,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), truth)
    _, along = torch.func.jvp(loss, (q,), (v.repeat_interleave(2, 1),))
    torch.testing.assert_close(along, (truth * v.repeat_interleave(2, 1)).sum(), rtol=1e-4, atol=1e-4)
    several = torch.func.vmap(lambda q: dot_product_attention(q, k, v, **kwargs))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(several[1], dot_product_attention(2 * q, k, v, **kwargs))
    biases = torch.randn(3, 4, 9, 9)
    several = torch.func.vmap(lambda bias: dot_product_attention(q, k, v, attn_bias=bias))(biases)
    torch.testing.assert_close(several[1], dot_product_attention(q, k, v, attn_bias=biases[1]))
    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms need .*; use 'naive' or 'auto'"):
        torch.func.grad(lambda q: dot_product_attention(q, k, v, backend="tiled", **kwargs).sum())(q)


@pytest.mark.parametrize("name", ["flash", "efficient", "cuda_kernel"])
def test_a_way_of_another_device_is_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=f"backend: '{name}' cannot serve this call.*cpu"):
        dot_product_attention(*qkv(), backend=name)


REQUESTS = {
    "plain": ({}, "sdpa"),
    "causal": ({"causal": True}, "sdpa"),
    "padding": ({"mask": torch.ones(2, 9, dtype=torch.bool)}, "sdpa"),
    "whole mask": ({"mask": torch.ones(9, 9, dtype=torch.bool)}, "cpu_kernel"),
    "window": ({"causal": True, "window": 3}, "cpu_kernel"),
    "documents": ({"document_ids": torch.zeros(2, 9, dtype=torch.long)}, "cpu_kernel"),
    "slopes": ({"attn_bias": AlibiBias(4)}, "cpu_kernel"),
    "log-sum-exp": ({"return_lse": True}, "cpu_kernel"),
    "dropout": ({"dropout": 0.1}, "products"),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_what_auto_takes_for_a_small_request(request_):
    arguments, expected = REQUESTS[request_]
    choice = select_backend(*qkv(), **arguments)
    assert choice.way == expected
    assert choice.name == next(way.backend for way in WAYS if way.name == expected)
    assert set(choice.ruled_out) == {"naive", "tiled", "fused"} - {choice.name}
    assert all(choice.ruled_out.values())


@pytest.mark.parametrize(("of_key", "backend"), [(100.0, "fused"), (400.0, "tiled")])
def test_large_values_matter_by_the_scores_they_can_make(of_key, backend):
    q, k, v = (x.detach() for x in qkv(d=64))
    # Of one column: no score is as large as the largest values times the width would let it be.
    q[0, 0, 0, 0], k[0, 0, 0] = 2000.0, of_key / 8
    assert select_backend(q, k, v).name == backend
    q[0, 0, 0, 0] = float("nan")
    assert select_backend(q, k, v).name == "tiled"


def test_what_keeps_nothing_is_not_chosen_to_be_kept():
    for arguments, expected in (({}, "cpu"), ({"window": 3}, "cpu_kernel"), ({"dropout": 0.1}, "products")):
        decision, *_ = decide(*qkv(), keep=True, **arguments)
        assert decision.way.name == expected
    with pytest.raises(NotImplementedError, match="nothing that could be kept"):
        decide(*qkv(), keep=True, backend="naive")


@pytest.mark.parametrize("arguments", [{"causal": True}, {"window": 3}, {"dropout": 0.3}, {"attn_bias": True}], ids=str)
def test_kept_results_stand_for_the_forward_pass(arguments):
    q, k, v = qkv()
    bias = RelativePositionBias(4)
    if arguments.get("attn_bias"):
        arguments = {"attn_bias": bias}

    def both(attend):
        torch.manual_seed(3)
        decision, *heads = decide(q, k, v, keep=True, **arguments)
        out = attend(decision, *heads)
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v, *bias.parameters()), allow_unused=True))

    truth = both(lambda decision, *heads: decision.attend(*heads)[0])
    kept = both(lambda decision, *heads: decision.attend(*heads, results=decision.compute(*heads))[0])
    assert_same(kept, truth, 0.0)


def test_resuming_computes_nothing_of_the_forward_pass():
    decision, *heads = decide(*qkv(), keep=True, causal=True)
    results = decision.compute(*heads)
    with FlopCounterMode(display=False) as count, LiveBytes() as live:
        decision.attend(*heads, results=results)
    assert count.get_total_flops() == 0
    assert not live.calls["_scaled_dot_product_flash_attention_for_cpu"]


def test_the_decision_that_autograd_holds_has_no_tensor():
    mask, ids = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.long)
    decision, *heads = decide(*qkv(), mask=mask, document_ids=ids, attn_bias=torch.zeros(9, 9), keep=True)
    out, _ = decision.attend(*heads)
    held = out.grad_fn.decision.request
    assert held.tensors == (None, None)
    assert held.bias.values is None
    again = held.with_tensors(*decision.request.tensors)
    assert all(one is other for one, other in zip(again.tensors, decision.request.tensors, strict=True))
    assert again.with_tensors() == decision.request.with_tensors() == held


class PerSequence(torch.nn.Module):
    """A bias for each sequence, of the heads that are asked for, and safe in several threads."""

    several_threads = True

    def __init__(self):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.tensor([[0.5, 1.0], [-2.0, 0.25]])[:, :, None, None])

    def forward(self, i, j, heads=slice(None)):
        return self.slopes[:, heads] * (i[:, None] - j[None, :]) / 10


@pytest.mark.parametrize("way", ["products", "cpu_kernel", "onednn", "naive"])
def test_a_bias_module_has_a_value_for_each_sequence(way):
    skip_unless_usable(way)
    bias, n = PerSequence(), 70
    q, k, v = (torch.randn(2, 2, n, 32, requires_grad=True) for _ in range(3))
    whole = bias(torch.arange(n), torch.arange(n))
    truth = ((q @ k.mT) * 32**-0.5 + whole).softmax(-1) @ v
    out = dot_product_attention(q, k, v, attn_bias=bias, backend=way, q_bucket_size=32, k_bucket_size=32)
    wanted = (q, k, v, bias.slopes)
    assert_same((out, *gradients(out, wanted)), (truth, *gradients(truth, wanted)), 1e-5)


@pytest.mark.parametrize("way", [{}, {"backend": "tiled"}, {"dropout": 0.1}], ids=str)
def test_no_query_heads_have_no_output(way):
    q, k = torch.randn(2, 0, 8, 16), torch.randn(2, 1, 8, 16)
    assert dot_product_attention(q, k, k, **way).shape == (2, 0, 8, 16)


def test_asking_for_the_backend_draws_nothing():
    q, before = torch.randn(1, 2, 8, 16), torch.get_rng_state()
    select_backend(q, q, q, dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [AlibiBias(2), torch.randn(1, 2, 1, 13)], ids=["module", "tensor"])
def test_a_single_querys_bias_is_laid_out_as_cudas_kernels_read_it(bias, dtype):
    """Of q's dtype, since they read it as such whatever it is, and with rows of a multiple of 8."""
    q, k = torch.randn(1, 2, 1, 16, dtype=dtype), torch.randn(1, 2, 13, 16, dtype=dtype)
    bias = bias.to(dtype) if isinstance(bias, torch.Tensor) else bias
    request = replace(build_request(q, k, k, attn_bias=bias, mask=torch.rand(1, 13) > 0.2), device_type="cuda")
    assert not_whole(request) is None
    assert whole_mask(request).dtype == dtype
    added = laid_out(whole_mask(request), dtype, request.score_shape)
    assert (added.shape, added.dtype) == ((1, 2, 1, 13), dtype)
    assert added.stride(-1) == 1
    assert added.stride(-2) % 8 == 0


@pytest.mark.parametrize(
    "given", [{"causal": True}, {}, {"mask": torch.rand(1, 13) > 0.2}, {"attn_bias": torch.randn(1, 2, 13, 13)}]
)
def test_cudnns_kernel_gets_only_what_is_causal(given, monkeypatch):
    q, _, _ = qkv(n=13, h=2, kv=2, d=16)
    request = replace(build_request(q, q, q, **given), device_type="cuda")
    causal = "causal" in given
    for kernels, serves in (({"efficient", "cudnn"}, causal), ({"efficient"}, True), ({"cudnn"}, False)):
        monkeypatch.setattr(sdpa, "fused_kernels", lambda *_, kernels=kernels: kernels)
        assert (sdpa.Sdpa().objection(request, q, q, q) is None) is serves


def test_cudas_kernel_of_a_first_pass_is_that_of_the_repetition(monkeypatch):
    """PyTorch chooses by whether gradients are wanted."""
    q = qkv(n=13, h=2, kv=2, d=16)[0].detach()
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, **options):
        asked.append(torch.is_grad_enabled() and q.requires_grad and k.requires_grad and v.requires_grad)
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    for device, wanted in (("cuda", [True, True, False]), ("cpu", [True, False, False])):
        request = replace(build_request(q, q, q, causal=True), device_type=device)
        leaf = q.detach().requires_grad_()
        (found,) = sdpa.Sdpa().forward(request, leaf, leaf, leaf)
        with torch.no_grad():
            (first,) = sdpa.Sdpa().forward(request, q, q, q)
        with torch.inference_mode():
            sdpa.Sdpa().forward(request, q, q, q)
        assert asked == wanted, device
        assert found.requires_grad
        assert not first.requires_grad
        assert torch.equal(found, first)
        asked.clear()


def test_rows_that_cudas_kernels_could_not_read_are_copied():
    """On a GPU they begin at multiples of 16 bytes."""
    for device in ("meta", "cpu"):
        buffer = torch.empty(1, 2, 9, 80, dtype=torch.bfloat16, device=device)
        for part, apart in ((buffer[..., :64], False), (buffer[..., 8:72], False), (buffer[..., 4:68], True)):
            (found,) = unit_stride(part)
            assert (found is not part) is (apart and device != "cpu")


class Scaled(torch.nn.Module):
    """A score function with a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, score, batch, head, query, key):
        return score * self.weight[head]


@pytest.mark.parametrize("way", ["products", "onednn", "cpu_kernel", "naive", "auto"])
@pytest.mark.parametrize("make", [PerSequence, Scaled, lambda: RelativePositionBias(2, 8, 16)])
def test_a_bias_modules_parameters_are_those_that_forward_saw(make, way):
    """functional_call lends a module others for one call."""
    skip_unless_usable(way)
    holder = torch.nn.ModuleDict({"bias": make()})
    q = torch.randn(2, 2, 70, 32)
    if way in ("onednn", "cpu_kernel") and isinstance(holder["bias"], Scaled):
        pytest.skip("it takes no function of the score")

    class Attends(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = holder

        def forward(self, q):
            return dot_product_attention(q, q, q, attn_bias=self.held["bias"], causal=True, backend=way)

    net = Attends()
    lent = {name: (p.detach() * 3 + 0.5).requires_grad_() for name, p in net.named_parameters()}
    out = functional_call(net, lent, (q,))
    found = gradients(out, lent.values())
    net.load_state_dict({name: p.detach() for name, p in lent.items()})
    own = net(q)
    assert_same((out, *found), (own, *gradients(own, net.parameters())), 1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.3])
@pytest.mark.parametrize("backend", ["auto", "tiled", "naive"])
def test_causality_with_a_scale_that_is_not_positive(scale, backend):
    q = torch.randn(1, 2, 33, 8, requires_grad=True)
    scores = (q @ q.mT * scale).masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf)
    truth = scores.softmax(-1) @ q
    out = dot_product_attention(q, q, q, causal=True, scale=scale, backend=backend)
    assert_same((out, *gradients(out, [q])), (truth, *gradients(truth, [q])), 1e-5)


@pytest.mark.parametrize("height", [1e4, 1e6, -1e9])
def test_a_large_bias_over_whole_rows_is_right_when_compiled(height):
    bias = torch.full((2, 33, 33), height)
    q, k, v = (torch.randn(1, 2, 33, 8, requires_grad=True) for _ in range(3))
    attend = torch.compile(lambda q, k, v: dot_product_attention(q, k, v, attn_bias=bias), backend="eager")
    truth = ((q @ k.mT) * 8**-0.5).softmax(-1) @ v
    out = attend(q, k, v)
    assert_same((out, *gradients(out, [q, k, v])), (truth, *gradients(truth, [q, k, v])), 1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("make", [Scaled, lambda: Scaled().forward])
def test_a_score_function_that_is_trained_is_compiled(make):
    q, score = torch.randn(1, 2, 9, 4, requires_grad=True), make()
    attend = torch.compile(lambda q: dot_product_attention(q, q, q, attn_bias=score), backend="eager")
    torch.testing.assert_close(attend(q), dot_product_attention(q, q, q, attn_bias=score))


def test_no_queries_have_no_bias():
    k = torch.randn(1, 2, 3, 8)
    for backend in ("naive", "tiled"):
        bias = RelativePositionBias(2)
        assert dot_product_attention(k[:, :, :0], k, k, attn_bias=bias, backend=backend).shape == (1, 2, 0, 8)


def test_eight_bits_are_too_few():
    q = torch.zeros(1, 1, 2, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"q: expected a floating-point dtype of 16 bits or more, got torch\.float8"):
        dot_product_attention(q, q, q)
