"""CUDA's memory-efficient kernel in tiles: against fp64 by a stand-in of its signature, and by fake CUDA tensors."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from memory_efficient_attention_pytorch import AlibiBias, RelativePositionBias, dot_product_attention
from memory_efficient_attention_pytorch.attention import cuda_kernel, tiles
from memory_efficient_attention_pytorch.attention.decision import Decision, decide
from memory_efficient_attention_pytorch.common.dry_run import STAND_IN, watched_by
from memory_efficient_attention_pytorch.torch_internals import attention_kernels
from memory_efficient_attention_pytorch.torch_internals.attention_kernels import Kernel
from memory_efficient_attention_pytorch.torch_internals.fake import fake_tensors
from tests.agreement import assert_same, gradients

WAY = cuda_kernel.CudaKernel()


def _check(bias: Tensor | None, query: Tensor, key: Tensor) -> None:
    assert query.shape[:2] == key.shape[:2], "as many key as query heads"
    if bias is not None:
        assert bias.shape == (*query.shape[:3], key.shape[2])
        assert bias.dtype == query.dtype
        assert bias.stride(-1) == 1
        assert bias.stride(-2) % 8 == 0


def forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    """As ``aten::_scaled_dot_product_efficient_attention``; rows that see nothing are NaN, as is what pads."""
    assert compute_log_sumexp
    assert not dropout_p
    assert not is_causal
    _check(attn_bias, query, key)
    scores = query.float() @ key.float().mT * scale + (0 if attn_bias is None else attn_bias.float())
    lse = scores.logsumexp(-1)
    out = (scores.softmax(-1) @ value.float()).to(query.dtype)
    n = query.shape[2]
    padded = torch.full((*lse.shape[:2], math.ceil(n / 32) * 32), math.nan)
    padded[:, :, :n] = torch.where(lse == -math.inf, 7.0, lse)
    return out, padded, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def backward(
    grad_out_,
    query,
    key,
    value,
    attn_bias,
    out,
    logsumexp,
    philox_seed,
    philox_offset,
    dropout_p,
    grad_input_mask,
    is_causal=False,
    *,
    scale=None,
):
    """As ``aten::_scaled_dot_product_efficient_attention_backward``."""
    assert out.dtype == query.dtype
    assert out.transpose(1, 2).is_contiguous(), "read as rows of all heads, whatever its strides"
    assert logsumexp.shape[2] % 32 == 0
    assert logsumexp.shape[2] - query.shape[2] < 32
    _check(attn_bias, query, key)
    q, k, v, grad = (x.float() for x in (query, key, value, grad_out_))
    scores = q @ k.mT * scale + (0 if attn_bias is None else attn_bias.float())
    weights = (scores - logsumexp[:, :, : q.shape[2], None]).exp()
    delta = (grad * out.float()).sum(-1, keepdim=True)
    grad_scores = weights * (grad @ v.mT - delta)
    found = (grad_scores @ k * scale, grad_scores.mT @ q * scale, weights.mT @ grad, grad_scores)
    return tuple(
        x.to(query.dtype) if wanted else torch.empty(0) for x, wanted in zip(found, grad_input_mask, strict=True)
    )


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(attention_kernels, "efficient_kernel", lambda: Kernel(forward, backward))
    monkeypatch.setattr(cuda_kernel, "QUERIES", 64)
    monkeypatch.setattr(cuda_kernel, "KEYS", 128)


def by_kernel(q, k, v, **arguments):
    sizes = {"q_bucket_size": 32, "k_bucket_size": 32}
    decision, q, k, v = decide(q, k, v, **arguments, **sizes)
    out, lse = Decision(decision.request, WAY).attend(q, k, v)
    return (out, lse) if arguments.get("return_lse") else out


N, M = 150, 203
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (40, 0)},
    "padding": {"causal": True, "mask": torch.arange(M) >= torch.tensor([[0], [120]])},
    "nothing to see": {"mask": torch.arange(N)[:, None] > torch.arange(M) + 60},
    "documents": {"document_ids": (torch.arange(M) // 77).expand(2, M)},
    "alibi": {"causal": True, "attn_bias": AlibiBias(4)},
    "relative": {"causal": True, "attn_bias": RelativePositionBias(4)},
    "bias of keys": {"attn_bias": torch.linspace(-2, 2, M)},
    "huge bias": {"attn_bias": torch.where(torch.arange(N)[:, None] > 90, -1e9, torch.linspace(-2, 2, M))},
}


@pytest.mark.parametrize("heads_at_once", [2, 4])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_tiles_by_the_kernel_are_right(stand_in, case, kv, heads_at_once, monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS_ON_A_CPU", heads_at_once * cuda_kernel.QUERIES * cuda_kernel.KEYS)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, N, 16), torch.randn(2, kv, M, 16), torch.randn(2, kv, M, 16)

    def of(attend, dtype, **options):
        tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        arguments, wanted = dict(CASES[case]), list(tensors)
        bias = arguments.get("attn_bias")
        if isinstance(bias, Tensor):
            arguments["attn_bias"] = bias.to(dtype, copy=True).requires_grad_()
            wanted.append(arguments["attn_bias"])
        elif bias is not None:
            wanted += [p for p in bias.parameters() if p.requires_grad]
        out = attend(*tensors, **arguments, **options)
        return [x.double() for x in (out.detach(), *gradients(out, wanted))]

    assert_same(of(by_kernel, torch.float32), of(dot_product_attention, torch.float64, backend="naive"), 1e-5)


def test_the_log_sum_exp_and_its_gradient(stand_in):
    torch.manual_seed(1)
    found = []
    for attend, dtype in ((by_kernel, torch.float32), (dot_product_attention, torch.float64)):
        torch.manual_seed(2)
        tensors = [torch.randn(1, 2, 100, 8).to(dtype).requires_grad_() for _ in range(3)]
        out, lse = attend(*tensors, causal=True, return_lse=True)
        both = out.sum(-1) + lse
        found.append([x.double() for x in (both.detach(), *gradients(both, tensors))])
    assert_same(*found, 1e-5)


class ForCuda:
    """A dry run for CUDA that goes through everything."""

    device_type, threads = "cuda", 1

    def few_of(self, parts, size, first, last, alike):
        return parts

    def working_on(self, owner):
        return nullcontext()

    def keeps(self, tensor):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["window", "padding", "documents", "alibi"])
def test_fake_cuda_tensors_go_through_the_kernel(case, dtype):
    fakes = fake_tensors()
    if fakes is None or attention_kernels.efficient_kernel() is None:
        pytest.skip("this PyTorch has no fake tensors or no such kernel")
    # Where PyTorch is built without CUDA it cannot even slice these: they lie where a dry run for CUDA has them.
    with fakes.mode(), watched_by(ForCuda()):
        sizes = ((4, N), (2, M), (2, M))
        q, k, v = (torch.empty(2, heads, n, 64, device=STAND_IN, dtype=dtype, requires_grad=True) for heads, n in sizes)
        made = {"mask": torch.bool, "document_ids": torch.int64}
        arguments = {
            name: torch.empty(value.shape, dtype=made[name], device=STAND_IN) if name in made else value
            for name, value in CASES[case].items()
        }
        decision, *heads = decide(q, k, v, **arguments)
        assert decision.way.name == "cuda_kernel"
        out = dot_product_attention(*heads, **arguments)
        assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
        for x, gradient in zip(heads, torch.autograd.grad(out.sum(), heads), strict=True):
            assert (gradient.shape, gradient.dtype, gradient.device) == (x.shape, dtype, x.device)


def test_what_the_kernel_does_not_take():
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    with pytest.raises(NotImplementedError, match="for CUDA, not for cpu"):
        dot_product_attention(q, k, v, backend="cuda_kernel")
