"""The same meaning on a CUDA device; run with ``pytest -m gpu``."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch import (
    AlibiBias,
    RelativePositionBias,
    Transformer,
    dot_product_attention,
    select_backend,
)
from memory_efficient_attention_pytorch.recompute.host_inputs import InputsOnHost

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (100, 0)},
    "padding": {"causal": True, "mask": "padding"},
    "padding alone": {"mask": "a sequence of padding"},
    "documents": {"causal": True, "document_ids": "documents"},
    "alibi": {"causal": True, "attn_bias": AlibiBias(4)},
    "relative": {"attn_bias": RelativePositionBias(4)},
    "nothing to see": {"mask": "hidden rows"},
}


def arguments(case, n):
    found = dict(CASES[case])
    if found.get("mask") == "padding":
        found["mask"] = torch.arange(n, device="cuda")[None] >= torch.tensor([[0], [n // 3]], device="cuda")
    if found.get("mask") == "hidden rows":
        found["mask"] = torch.arange(n, device="cuda")[:, None] > torch.arange(n, device="cuda") + n // 7
    if found.get("mask") == "a sequence of padding":
        found["mask"] = torch.arange(n, device="cuda")[None] < torch.tensor([[n - n // 3], [0]], device="cuda")
    if found.get("document_ids") == "documents":
        found["document_ids"] = (torch.arange(n, device="cuda") // 77)[None].expand(2, n).contiguous()
    if isinstance(found.get("attn_bias"), torch.nn.Module):
        found["attn_bias"] = found["attn_bias"].cuda()
    return found


def results(backend, case, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = dot_product_attention(*leaves, backend=backend, **arguments(case, tensors[0].shape[2]))
    weights = torch.arange(out.numel(), device="cuda", dtype=torch.float64).sin().view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def error(found, truth):
    # Not Python's max, which passes over NaN.
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(found, truth, strict=True)]).max()


def agrees(backend, case, tensors):
    """As close to fp64 as the definition in the same dtype, but for what kernels round that multiply fp32 by TF32s."""
    dtype = tensors[0].dtype
    truth = results("naive", case, [t.double() for t in tensors])
    budget = error(results("naive", case, tensors), truth) + 2 * torch.finfo(dtype).eps
    budget += 3e-5 if dtype == torch.float32 else 0.0
    assert error(results(backend, case, tensors), truth) <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["tiled", "auto"])
@pytest.mark.parametrize("n", [700, 704])
def test_attention_agrees_with_the_definition(n, backend, case, dtype):
    torch.manual_seed(0)
    agrees(backend, case, [torch.randn(2, heads, n, 64, device="cuda", dtype=dtype) for heads in (4, 2, 2)])


@pytest.mark.parametrize("n", [61, 700, 4500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "plain"])
def test_the_memory_efficient_kernel_in_tiles(case, dtype, n):
    """Lengths that are no multiples of what the kernel pads, in one tile and in several."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, heads, n, 64, device="cuda", dtype=dtype) for heads in (4, 2, 2))
    assert select_backend(q, k, v, backend="tiled", **arguments(case, n)).way == "cuda_kernel"
    agrees("cuda_kernel", case, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_some_heads_at_a_time(dtype):
    """More than a part holds: each reads its own of what all have in common."""
    q, k, v = (torch.randn(1, 8, 4500, 64, device="cuda", dtype=dtype) for _ in range(3))
    agrees("cuda_kernel", "window", (q, k, v))


@pytest.mark.parametrize("height", [1.0, -1e9])
def test_the_gradient_of_a_bias_through_the_kernel(height):
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 2, 700, 64, device="cuda") for _ in range(3))
    bias = torch.randn(1, 2, 700, 700, device="cuda")
    bias[:, :, 300:400] = height
    found = []
    for backend, dtype in (("cuda_kernel", torch.float32), ("naive", torch.float64)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v, bias)]
        out = dot_product_attention(*leaves[:3], attn_bias=leaves[3], causal=True, backend=backend)
        found.append([out, *torch.autograd.grad(out.sum(-1).sin().sum(), leaves)])
    assert error(*found) <= 1e-4


@pytest.mark.parametrize("settings", [{}, {"head_chunks": 2, "ff_chunks": 4}, {"dropout": 0.1}], ids=str)
def test_exact_reversal_equals_storing(settings):
    found = []
    for reversible in (True, False):
        torch.manual_seed(1)
        shape = {
            "num_tokens": 50,
            "max_seq_len": 128,
            "dim": 64,
            "depth": 24,
            "heads": 4,
            "dim_head": 16,
            "causal": True,
        }
        model = Transformer(**shape, exact=True, reversible=reversible, **settings).cuda()
        tokens = torch.randint(0, 50, (2, 129), device="cuda")
        torch.manual_seed(2)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], labels=tokens[:, 1:])
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    for name, rebuilt, stored in zip(dict(model.named_parameters()), *found, strict=True):
        # An embedding's gradient is summed by atomic additions, in no fixed order.
        tolerance = 1e-6 if "emb" in name else 0.0
        assert (rebuilt - stored).abs().max() <= tolerance, name


def test_memory_does_not_grow_with_depth():
    peaks = []
    for depth in (2, 16):
        shape = {"num_tokens": 64, "max_seq_len": 8192, "dim": 256, "heads": 4, "causal": True}
        model = Transformer(**shape, depth=depth, head_chunks=2, ff_chunks=16).cuda()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.randint(0, 64, (1, 8193), device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(tokens[:, :-1], labels=tokens[:, 1:]).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 1.03 * peaks[0]


@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"window": (40, 0)}, {"dropout": 0.1}, {"kv_heads": 2}, {"mask": True}], ids=str
)
def test_kept_attention_gives_the_gradients_of_computing_it_again(settings, autocast):
    """Within rounding: of several fused kernels PyTorch's choice need not be the one whose output we keep."""
    tokens = torch.randint(0, 50, (2, 129), device="cuda")
    mask = torch.arange(128, device="cuda")[None] >= torch.tensor([[0], [40]], device="cuda")
    given = {"mask": mask} if settings.get("mask") else {}
    found = []
    for keep in (False, True, "cpu"):
        torch.manual_seed(1)
        shape = {"num_tokens": 50, "max_seq_len": 128, "dim": 64, "depth": 3, "heads": 4, "dim_head": 16}
        built = {k: v for k, v in settings.items() if k != "mask"}
        model = Transformer(**shape, causal=True, head_chunks=2, exact=True, keep_attention=keep, **built).cuda()
        torch.manual_seed(2)
        with torch.autocast("cuda", autocast, enabled=autocast != torch.float32):
            loss = model(tokens[:, :-1], labels=tokens[:, 1:], **given)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    allowed = 2e-2 if autocast == torch.bfloat16 else 1e-4
    assert error(found[1], [g.double() for g in found[0]]) <= allowed
    assert error(found[2], [g.double() for g in found[0]]) <= allowed


def test_attention_kept_in_host_memory_takes_none_of_the_device():
    shape = {"num_tokens": 64, "max_seq_len": 8192, "dim": 256, "depth": 4, "heads": 4, "causal": True}
    tokens = torch.randint(0, 64, (1, 8193), device="cuda")
    kept = {}
    for keep in (False, True, "cpu"):
        model = Transformer(**shape, head_chunks=2, ff_chunks=16, keep_attention=keep).cuda()
        model(tokens[:, :-1], labels=tokens[:, 1:]).backward()
        before = torch.cuda.memory_allocated()
        loss = model(tokens[:, :-1], labels=tokens[:, 1:])
        kept[keep] = (torch.cuda.memory_allocated() - before) / (8192 * 256 * 4)
        loss.backward()
        del loss  # whose graph holds this model while the next one is measured
    assert kept[True] >= kept[False] + 4
    assert kept["cpu"] <= kept[False] + 0.01


def test_inputs_of_checkpoints_wait_on_the_host_and_gradients_are_the_same():
    depth, shape = 16, (64, 1024, 1024)
    taken, found = [], []
    for run in (checkpoint, InputsOnHost(checkpoint)):
        torch.manual_seed(0)
        made = [torch.nn.Linear(1024, 1024, device="cuda") for _ in range(depth)]
        x = torch.randn(shape, device="cuda", requires_grad=True)
        for _ in range(2):  # the second has what the first left behind
            torch.cuda.reset_peak_memory_stats()
            before, out = torch.cuda.memory_allocated(), x.sin()
            for layer in made:
                out = run(lambda a, layer=layer: layer(a).tanh(), out, use_reentrant=False)
            gradients = torch.autograd.grad(
                out.square().mean(), [x, *(w for layer in made for w in layer.parameters())]
            )
            taken.append((torch.cuda.max_memory_allocated() - before) / x.nbytes)
            del out
        found.append(gradients)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert taken[3] < taken[1] - (depth - 6)
