"""The dry run sees the allocations of the real step, on any module, and cutting loops short changes nothing."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch import Transformer, dot_product_attention
from memory_efficient_attention_pytorch.attention import onednn
from memory_efficient_attention_pytorch.common import products
from memory_efficient_attention_pytorch.planner import accounting
from memory_efficient_attention_pytorch.planner.accounting import Accounting, accounting_for
from memory_efficient_attention_pytorch.planner.step import Step, dry_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS = torch.zeros(2, 128, dtype=torch.long, device="meta")
BYTES = 4


def plain(device=CPU):
    """Counts tensors alone."""
    return Accounting(device)


def mean(output):
    return output.mean()


def language_model(**changes):
    keywords = {"num_tokens": 64, "max_seq_len": 128, "dim": 32, "depth": 2, "heads": 4, "dim_head": 8, "causal": True}
    with torch.device("meta"):
        return Transformer(**{**keywords, **changes})


class Squares(nn.Module):
    """``(x w)²``, of which the forward pass keeps x, w and x w."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width))

    def forward(self, x):
        return (x @ self.weight) ** 2


def test_every_storage_is_counted_once_and_as_long_as_it_lives():
    rows, width = 1000, 10
    step = Step(Squares(width), torch.sum, (torch.zeros(rows, width),), optimizer=None)
    timeline = dry_run(step, plain())
    weight, stream = width * width * BYTES, rows * width * BYTES
    passed = zip(timeline.operations, timeline.totals, strict=True)
    forward = [total for operation, total in passed if operation.phase == "forward"]
    assert forward == [2 * weight + 2 * stream, 2 * weight + 3 * stream]  # x, x w and (x w)²
    # Backward through the square: x w again, twice that and its product with the gradient, beside x and x w; the loss
    # and its gradient are two numbers.
    assert timeline.totals.max() == 2 * weight + 5 * stream + 2 * BYTES
    breakdown = timeline.breakdown(timeline.peak)
    assert breakdown["parameters"] == breakdown["gradients"] == weight
    assert breakdown["streams"] + breakdown["loss"] == 5 * stream + 2 * BYTES


def test_flops_are_two_per_multiply_add_with_two_products_in_backward():
    step = Step(Squares(10), torch.sum, (torch.zeros(1000, 10, requires_grad=True),))
    assert dry_run(step, plain()).flops == 3 * 2 * 1000 * 10 * 10


def test_the_users_model_is_left_alone():
    model = Squares(4)
    before = dict(model.named_parameters())
    dry_run(Step(model, torch.sum, (torch.zeros(3, 4),)), plain())
    assert dict(model.named_parameters()) == before
    assert type(model.weight) is nn.Parameter
    assert model.weight.grad is None


def test_tied_parameters_and_optimizer_state_are_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(100, 8)
            self.head = nn.Linear(8, 100, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    timeline = dry_run(Step(Tied(), mean, (torch.zeros(4, dtype=torch.long),)), plain())
    start = timeline.breakdown(0)
    assert start["parameters"] == start["gradients"] == 800 * BYTES
    assert start["optimizer"] == 2 * 800 * BYTES + BYTES  # two moments, and the count of steps


def test_checkpointing_is_seen_to_save():
    class Deep(nn.Sequential):
        def __init__(self, recompute):
            super().__init__(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(8)))
            self.recompute = recompute

        def forward(self, x):
            for layer in self:
                x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            return x

    x = torch.zeros(4096, 16, requires_grad=True)
    stored, recomputed = (dry_run(Step(Deep(flag), mean, (x,)), plain()) for flag in (False, True))
    assert recomputed.totals.max() < 0.7 * stored.totals.max()
    assert recomputed.flops > stored.flops


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_hugging_face_models_run_dry(device, autocast):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"
    )
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    inputs = {"input_ids": TOKENS, "labels": TOKENS}
    timeline = dry_run(Step(model, lambda output: output.loss, kwargs=inputs, autocast=autocast), plain(device))
    assert sum(p.numel() for p in model.parameters()) * BYTES <= timeline.breakdown(0)["parameters"]
    assert timeline.live[:, 4].max() > 0, "attention is known by its class"
    assert timeline.live[:, 5].max() > 0, "so is the feed-forward"


def test_cuda_without_a_gpu_takes_fused_attention_where_the_cpu_would_not():
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True, norm_first=True)
    step = Step(layer, mean, (torch.zeros(1, 1024, 32, requires_grad=True),))
    on_cpu, on_cuda = (dry_run(step, plain(device)) for device in (CPU, CUDA))
    scores = 2 * 1024 * 1024 * BYTES
    assert on_cpu.totals.max() > 2 * scores
    assert on_cuda.totals.max() < scores


def test_operations_know_phase_and_module():
    timeline = dry_run(Step(language_model(ff_chunks=2), lambda loss: loss, (TOKENS,), {"labels": TOKENS}), plain())
    found = {(operation.phase, operation.module) for operation in timeline.operations}
    # A branch that multiplies by itself is known by its last layer.
    assert ("forward", "layers.0.0.fn.to_out") in found
    assert ("backward", "layers.1.0.fn.to_out") in found
    assert any(phase == "backward" and module.startswith("layers.0.1.fn.net") for phase, module in found)
    assert {phase for phase, _ in found} == {"forward", "loss", "backward", "optimizer"}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"head_chunks": 4, "ff_chunks": 7}, 600),
        ({"window": 40, "q_bucket_size": 32, "k_bucket_size": 64, "ff_chunks": 7}, 269),
        ({"dropout": 0.1, "q_bucket_size": 64, "k_bucket_size": 32}, 360),
        ({"dropout": 0.1, "q_bucket_size": 32, "k_bucket_size": 64}, 260),
        ({"positions": "alibi", "q_bucket_size": 64, "k_bucket_size": 64, "head_chunks": 4}, 380),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_loops_cut_short_have_the_peak_of_the_whole(changes, tokens, device):
    x = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    model = language_model(max_seq_len=tokens, depth=1, **changes)
    step = Step(model, lambda loss: loss, (x,), {"labels": x}, optimizer=None, autocast=torch.bfloat16)
    short, whole = (dry_run(step, plain(device), every_part=every_part) for every_part in (False, True))
    assert len(short.operations) < len(whole.operations)
    assert short.totals.max() == whole.totals.max()
    assert short.breakdown(short.peak) == whole.breakdown(whole.peak)


class Forgetful(dict):
    """Keeps nothing that a loop did."""

    def __contains__(self, key):
        return False


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize(
    ("changes", "autocast"),
    [
        ({"dropout": 0.1}, None),
        ({"keep_attention": True, "exact": True}, torch.bfloat16),
        ({"reversible": False}, None),
    ],
    ids=str,
)
def test_loops_noted_down_again_are_those_gone_through(changes, autocast, device, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: device == CPU)
    monkeypatch.setattr(products, "LEAST_TERMS", 1)
    cut = {"q_bucket_size": 64, "k_bucket_size": 64, "head_chunks": 2, "dim": 64}
    model = language_model(max_seq_len=150, backend="tiled", **cut, **changes)
    x = torch.zeros(1, 150, dtype=torch.long, device="meta")
    step = Step(model, lambda loss: loss, (x,), {"labels": x}, autocast=autocast)
    noted, gone_through = accounting_for(device, threads=2), accounting_for(device, threads=2)
    gone_through.loops = Forgetful()
    expected = dry_run(step, gone_through)
    for found in (dry_run(step, noted), dry_run(step, noted)):
        assert found.operations == expected.operations
        assert (found.live == expected.live).all()
        assert found.flops == pytest.approx(expected.flops, rel=1e-12)
    assert len(noted.loops) >= 2, "forward and backward of attention"


@pytest.mark.parametrize(("keep_attention", "device"), [(True, CPU), (True, CUDA), ("cpu", CUDA)], ids=str)
@pytest.mark.parametrize(("autocast", "width"), [(None, BYTES), (torch.bfloat16, 2)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_kept_of_every_group_and_block_counts(groups, autocast, width, keep_attention, device):
    tokens, heads, depth = 300, 8, 2
    x = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    keywords = {"max_seq_len": tokens, "heads": heads, "depth": depth, "head_chunks": groups}
    model = language_model(keep_attention=keep_attention, exact=autocast is not None, **keywords)
    step = Step(model, lambda loss: loss, (x,), {"labels": x}, optimizer=None, autocast=autocast)
    short, whole = (dry_run(step, plain(device), every_part=every_part) for every_part in (False, True))
    assert short.totals.max() == whole.totals.max()
    assert short.breakdown(short.peak) == whole.breakdown(whole.peak)
    assert short.flops == whole.flops
    forward_ends = [operation.phase for operation in short.operations].index("loss")
    kept = depth * tokens * heads * (8 * width + BYTES)  # the output of each head, 8 wide, and its log-sum-exp
    on_host = device != CPU and keep_attention == "cpu"
    assert short.breakdown(forward_ends)["attention"] == pytest.approx(0 if on_host else kept, abs=0.1 * kept)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(64, 64), (64, 96), (96, 64)])
def test_what_causality_hides_is_not_computed(n, m, device, dtype):
    """Attention's two products in forward and five in backward, over all scores and over those below the diagonal."""
    heads, width = 2, 16

    class Attends(nn.Module):
        def __init__(self, causal):
            super().__init__()
            self.weight, self.causal = nn.Parameter(torch.ones(width)), causal

        def forward(self, q, k):
            q, k = q * self.weight, k * self.weight
            return F.scaled_dot_product_attention(q, k, k, is_causal=self.causal)

    def flops(causal):
        q, k = (torch.zeros(1, heads, tokens, width, dtype=dtype) for tokens in (n, m))
        return dry_run(Step(Attends(causal).to(dtype), lambda out: out.float().sum(), (q, k)), plain(device)).flops

    per_score = 7 * 2 * heads * width
    below = sum(min(i + 1, m) for i in range(n))
    assert (flops(False), flops(True)) == (per_score * n * m, per_score * below)


def test_floating_point_operations_of_loops_cut_short_are_those_of_the_whole():
    x = torch.zeros(1, 1024, dtype=torch.long, device="meta")
    chunked = {"head_chunks": 4, "ff_chunks": 8, "loss_chunk_size": 64}
    flops = [
        dry_run(Step(language_model(max_seq_len=1024, **way), lambda loss: loss, (x,), {"labels": x}), plain()).flops
        for way in ({"loss_chunk_size": 1024}, chunked)
    ]
    assert flops[0] == flops[1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_the_threads_that_are_planned_for_choose_the_tiles(onednn_is_faster):
    """Not those of the process that plans."""

    class Attention(nn.Module):
        def forward(self, x):
            return dot_product_attention(x, x, x, causal=True)

    heads = torch.zeros(1, 1, 2048, 32, requires_grad=True)
    for threads in (1, onednn.MOST_THREADS + 1):
        timeline = dry_run(Step(Attention(), torch.sum, (heads,), optimizer=None), Accounting(CPU, threads))
        names = {operation.name for operation in timeline.operations}
        assert any("convolution" in name for name in names) == (threads == 1)


def test_data_dependent_code_is_refused_by_name():
    class Chooses(nn.Linear):
        def forward(self, x):
            return super().forward(x[x.sum(-1) > 0])

    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.max() > 0 else x

    for module, operation in ((Chooses(4, 4), "index.Tensor"), (Asks(4, 4), "_local_scalar_dense.default")):
        with pytest.raises(NotImplementedError, match=f"aten.{operation} in inner cannot be dry-run"):
            dry_run(Step(nn.Sequential(OrderedDict(inner=module)), mean, (torch.zeros(3, 4),)), plain())

    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.numpy().sum()

    with pytest.raises(NotImplementedError, match=r"Tensor.numpy in the forward cannot be dry-run"):
        dry_run(Step(Reads(4, 4), mean, (torch.zeros(3, 4),)), plain())


def test_nothing_is_left_behind_when_a_run_fails():
    before = nn.functional.scaled_dot_product_attention, torch.Generator, torch.cuda.device
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|reduction dim"):
        dry_run(Step(Squares(4), torch.sum, (torch.zeros(3, 5),)), plain(CUDA))
    assert (nn.functional.scaled_dot_product_attention, torch.Generator, torch.cuda.device) == before
    assert not nn.modules.module._global_forward_hooks
    assert torch.ones(2, 2).sum().item() == 4


def test_gradients_are_added_in_place_as_the_engine_adds_them():
    class TwoUses(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000, 1000))

        def forward(self, x):
            return (x @ self.weight).sum() + (x.sin() @ self.weight).sum()

    for device in (CPU, CUDA):
        timeline = dry_run(Step(TwoUses(), torch.sum, (torch.zeros(2, 1000),), optimizer=None), plain(device))
        # The parameter, its gradient, and two gradients to be added: a third would hold their sum.
        weights = timeline.totals.max() / (1000 * 1000 * BYTES)
        assert 4 <= weights < 4.1


def test_unknown_optimizer_is_refused_and_a_function_is_taken():
    step = Step(Squares(4), torch.sum, (torch.zeros(3, 4),), optimizer="lion")
    with pytest.raises(ValueError, match="optimizer: expected one of adamw"):
        dry_run(step, plain())
    sgd = Step(Squares(4), torch.sum, (torch.zeros(3, 4),), optimizer=lambda ps: torch.optim.SGD(ps, momentum=0.9))
    assert dry_run(sgd, plain()).breakdown(0)["optimizer"] == 4 * 4 * BYTES


def test_devices_add_what_their_allocators_and_kernels_take():
    cpu, cuda = accounting_for(CPU, threads=2), accounting_for(CUDA)
    assert cuda.rounding(1) == 511
    assert cuda.rounding(512) == 0
    assert cpu.rounding(100) < 100
    assert (100 * 1024 + 1 + cpu.rounding(100 * 1024 + 1)) % 4096 == 0
    token_major = torch.empty(1, 64, 4, 8).transpose(1, 2)
    head_major = token_major.contiguous()

    def workspace(operation, *arguments, **keywords):
        return cpu.anew().workspace(operation.default, arguments, keywords)

    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    nothing = workspace(torch.ops.aten.view, head_major)
    assert workspace(backward, head_major) - workspace(backward, token_major) == head_major.nbytes
    assert workspace(torch.ops.aten.logsumexp, head_major) - nothing == head_major.nbytes


def test_the_cpu_copies_what_is_of_another_dtype_and_keeps_kernels_by_shape(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cpu = accounting_for(CPU, threads=2)
    single, half = torch.empty(100, 100), torch.empty(100, 100, dtype=torch.bfloat16)
    add, total, product = torch.ops.aten.add_.Tensor, torch.ops.aten.sum.dim_IntList, torch.ops.aten.mm.default
    assert cpu.workspace(add, (single, single), {}) == 0
    assert cpu.workspace(add, (single, half), {}) == single.nbytes
    assert cpu.workspace(total, (half, [0]), {"dtype": torch.float32}) == single.nbytes

    def kept(accounting, rows):
        accounting.workspace(product, (half[:rows], half), {})
        return sum(accounting.kept.values())

    nothing = sum(cpu.kept.values())
    first, again, other = (kept(cpu, rows) for rows in (50, 50, 60))
    assert nothing < first == again < other
    assert kept(cpu.anew(), 60) == first
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # PyTorch's own loops
    assert kept(cpu.anew(), 60) == nothing


def test_tile_registers_need_packed_keys_and_more_kernels_for_ragged_lengths(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def taken(tokens, amx, threads=1, dtype=torch.bfloat16):
        monkeypatch.setattr(accounting, "has_amx", lambda: amx)
        q = torch.empty(1, 2, tokens, 64, dtype=dtype)
        cpu = accounting_for(CPU, threads=threads)
        workspace = cpu.workspace(forward, (q, q, q), {})
        cpu.workspace(backward, (q, q, q, q, q, q[..., 0]), {})
        return workspace, sum(cpu.kept.values())

    for tokens in (512, 600, 1024):
        assert taken(tokens, True)[0] - taken(tokens, False)[0] == 2 * (2 * tokens * 64 * 2)
        assert taken(tokens, True, dtype=torch.float32) == taken(tokens, False, dtype=torch.float32)
    more = [taken(tokens, True)[1] - taken(tokens, False)[1] for tokens in (500, 600, 1024, 3000)]
    assert more[0] == more[2] == 0 < more[1] == more[3]
    assert taken(600, True, threads=4)[1] - taken(600, False, threads=4)[1] > more[1]


def test_in_place_operations_return_what_they_return():
    """Numbers that PyTorch knows of a fake tensor are counted on, and an argument that does not fit is refused."""

    class Counts(nn.Module):
        def forward(self, x):
            steps = torch.tensor(0)
            for _ in range(50):
                steps += 1
            return x.repeat(steps.item(), 1)

    times = dry_run(Step(Counts(), torch.sum, (torch.zeros(4, 2, requires_grad=True),)), plain())
    assert times.totals.max() >= 50 * 4 * 2 * BYTES

    class Wrong(nn.Module):
        def forward(self, x):
            total = torch.zeros(4, 2)
            total.add_(x.detach())
            return total.add_(x.detach()[:3]).sum() + x.sum()

    with pytest.raises(RuntimeError, match=r"(?i)broadcast"):
        dry_run(Step(Wrong(), torch.sum, (torch.zeros(4, 2, requires_grad=True),)), plain())
