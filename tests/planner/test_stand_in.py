"""What a dry run for CUDA is told where there is no GPU: devices, kernels, autocast; and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from memory_efficient_attention_pytorch import dot_product_attention, select_backend
from memory_efficient_attention_pytorch.common.dry_run import STAND_IN
from memory_efficient_attention_pytorch.planner import plan
from memory_efficient_attention_pytorch.planner.accounting import Accounting
from memory_efficient_attention_pytorch.planner.stand_in import standing_in
from memory_efficient_attention_pytorch.planner.step import Step, dry_run
from memory_efficient_attention_pytorch.torch_internals import taken_away
from memory_efficient_attention_pytorch.torch_internals.fake import fake_tensors

CUDA, HOST = torch.device("cuda"), torch.device("cpu")
ROWS, WIDTH = 1000, 64


class Runs(nn.Module):
    """Any function of a tensor and a weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def run_dry(function, device=CUDA, autocast=None):
    x = torch.zeros(ROWS, WIDTH, requires_grad=True)
    step = Step(Runs(function), lambda output: output.float().sum(), (x,), optimizer=None, autocast=autocast)
    return dry_run(step, Accounting(device))


def stand_in():
    return standing_in("cuda")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, device="cuda"),
        lambda: torch.ones(3, device="cuda:0"),
        lambda: torch.ones(3, device=CUDA),
        lambda: torch.ones(3, device=0),
        lambda: torch.ones(3).cuda(),
        lambda: torch.ones(3).to("cuda", torch.bfloat16),
        lambda: torch.ones(3).to(0),
        lambda: torch.ones(3).to(device="cuda"),
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: torch.as_tensor([1, 2], device="cuda"),
        lambda: torch.tensor([1.0, 2.0]).to("cuda"),
        lambda: nn.Linear(3, 3, device="cuda").weight,
        lambda: torch.ones(3, device="cuda").new_zeros(2),
        lambda: torch.ones(3, device="cuda") + torch.ones(()),
    ],
)
def test_what_is_asked_to_lie_on_the_device_does(make):
    with fake_tensors().mode(), stand_in():
        assert make().device == STAND_IN


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device=HOST),
        lambda x: torch.ones(3),
        lambda x: torch.empty(3, pin_memory=True),
        lambda x: x.cpu().pin_memory(),
    ],
)
def test_the_host_is_another_place(make):
    with fake_tensors().mode(), stand_in():
        x = torch.ones(3, device="cuda")
        made = make(x)
        assert made.device == HOST
        assert made.to(x.device).device == STAND_IN
        with pytest.raises(RuntimeError, match=r"same device|different devices"):
            x + made


def test_what_is_kept_on_the_host_does_not_count():
    """PyTorch's own offloading, of any module."""

    def stored(x, weight):
        return (x @ weight).sin().sin().sin() @ weight

    def offloaded(x, weight):
        with torch.autograd.graph.save_on_cpu():
            return stored(x, weight)

    at_loss = [
        next(total for operation, total in zip(made.operations, made.totals, strict=True) if operation.phase == "loss")
        for made in (run_dry(stored), run_dry(offloaded))
    ]
    assert at_loss[0] - at_loss[1] > 3.5 * ROWS * WIDTH * 4


def casts(function, *, on_cuda, dtype=torch.bfloat16):
    device = STAND_IN if on_cuda else HOST
    with fake_tensors().mode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(4, 8, 8, dtype=dtype, device=device, requires_grad=True)
        if not on_cuda:
            return function(x)
        with stand_in():
            return function(x)


@pytest.mark.parametrize(
    ("function", "on_cpu", "on_cuda"),
    [
        (lambda x: F.layer_norm(x, (8,)), "bf16", "fp32"),
        (lambda x: F.group_norm(x, 2), "bf16", "fp32"),
        (lambda x: x.softmax(-1), "bf16", "fp32"),
        (lambda x: F.log_softmax(x, -1), "bf16", "fp32"),
        (lambda x: nn.Softmax(-1)(x), "bf16", "fp32"),
        (lambda x: x.sum(), "bf16", "fp32"),
        (lambda x: x.sum(-1, dtype=torch.float64), "fp64", "fp64"),
        (lambda x: x.cumsum(-1), "bf16", "fp32"),
        (lambda x: x**2, "bf16", "fp32"),
        (lambda x: 2**x, "bf16", "fp32"),
        (lambda x: x.rsqrt(), "bf16", "fp32"),
        (lambda x: F.softplus(x), "bf16", "fp32"),
        (lambda x: F.normalize(x), "bf16", "fp32"),
        (lambda x: x.exp_(), "bf16", "bf16"),
        (lambda x: F.gelu(x), "bf16", "bf16"),
        (lambda x: F.mse_loss(x, x), "fp32", "fp32"),
        (lambda x: x @ x.mT, "bf16", "bf16"),
        (lambda x: torch.einsum("bij,bkj->bik", x.float(), x.float()), "bf16", "bf16"),
        (lambda x: F.pad(x, (1, 1), mode="reflect"), "fp32", "bf16"),
        (lambda x: torch.addcmul(x, x, x.float()), "fp32", "fp32"),
    ],
)
def test_autocast_casts_as_on_the_device(function, on_cpu, on_cuda):
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

    def run(x):
        return function(x.detach())

    assert casts(run, on_cuda=False).dtype == dtypes[on_cpu]
    assert casts(run, on_cuda=True).dtype == dtypes[on_cuda]


def test_casts_are_differentiated():
    with fake_tensors().mode(), stand_in(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(4, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        F.layer_norm(x, (8,)).sum().backward()
        assert x.grad.dtype == torch.bfloat16
        assert x.grad.device == STAND_IN


@pytest.mark.parametrize(("autocast", "width"), [(None, 4), (torch.bfloat16, 2)], ids=str)
def test_linear_layers_compute_in_autocasts_precision(autocast, width):
    made = run_dry(F.linear, autocast=autocast)
    names = [operation.name for operation in made.operations]
    product = names.index("aten.mm.default")
    assert made.totals[product] - made.totals[product - 1] == ROWS * WIDTH * width
    assert names[:product].count("aten._to_copy.default") == (0 if autocast is None else 2)


def test_dropout_keeps_a_mask_of_bool_where_the_cpu_keeps_numbers():
    def drops(x, weight):
        return F.dropout(x @ weight, 0.1)

    on_cpu, on_cuda = run_dry(drops, HOST), run_dry(drops)
    assert any("native_dropout" in operation.name for operation in on_cuda.operations)
    assert on_cpu.totals.max() - on_cuda.totals.max() >= ROWS * WIDTH * 2


@pytest.mark.parametrize(
    ("shapes", "dtype", "masked", "kernel"),
    [
        (((1, 2, 32, 64), (1, 2, 32, 64)), torch.bfloat16, False, "flash_attention"),
        (((1, 4, 32, 64), (1, 2, 32, 64)), torch.bfloat16, False, "flash_attention"),
        (((1, 2, 32, 64), (1, 2, 32, 64)), torch.bfloat16, True, "efficient_attention"),
        (((1, 2, 32, 64), (1, 2, 32, 64)), torch.float32, False, "efficient_attention"),
        (((1, 2, 32, 6), (1, 2, 32, 6)), torch.float32, False, None),
        (((1, 4, 32, 64), (1, 2, 32, 64)), torch.float32, False, None),
        (((1, 2, 32, 64), (1, 2, 32, 64)), torch.float64, False, None),
    ],
)
def test_attention_of_other_modules_takes_the_devices_kernel(shapes, dtype, masked, kernel):
    def attends(x, weight):
        q, k = (torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes)
        mask = torch.ones(32, 32, dtype=torch.bool, device="cuda") if masked else None
        grouped = shapes[0] != shapes[1]
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=grouped).sum() + (x @ weight).sum()

    names = [operation.name for operation in run_dry(attends).operations]
    taken = {name.split(".")[1] for name in names if "scaled_dot_product" in name}
    expected = set() if kernel is None else {f"_scaled_dot_product_{kernel}", f"_scaled_dot_product_{kernel}_backward"}
    assert taken == expected


@pytest.mark.parametrize(("width", "way"), [(20, "products"), (32, "sdpa")])
def test_our_attention_is_planned_in_tiles_where_no_kernel_takes_its_width(width, way):
    found = []

    def attend(x, weight):
        q = (x @ weight).view(1, 2, -1, width).to(torch.bfloat16)
        given = {"mask": torch.ones(1, q.shape[2], dtype=torch.bool, device=x.device)}
        found.append(select_backend(q, q, q, **given).way)
        return dot_product_attention(q, q, q, **given)

    run_dry(attend)
    assert found == [way]


@pytest.mark.parametrize("network", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_refused_by_name(network):
    """cuDNN keeps for backward what nobody but it knows, and so does oneDNN, which computes LSTM alone."""
    x = torch.zeros(5, 3, 8, device="meta")
    options = {"example_inputs": x, "loss_fn": lambda output: output[0].sum(), "optimizer": None}
    with pytest.raises(NotImplementedError, match="cuDNN"):
        plan(network(8, 8), device="cuda", **options)
    if network is nn.LSTM and torch.backends.mkldnn.is_available():
        with pytest.raises(NotImplementedError, match=r"mkldnn_rnn_layer.* cannot be dry-run: what oneDNN allocates"):
            plan(network(8, 8), device="cpu", **options)
    else:
        assert plan(network(8, 8), device="cpu", **options).peak_bytes > 0


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_modules_own_autocast_for_the_device_is_refused():
    def casts_itself(x, weight):
        with torch.autocast("cuda", torch.bfloat16):
            return x @ weight

    with pytest.raises(NotImplementedError, match=r"own torch\.autocast"):
        run_dry(casts_itself)
    before = torch.get_autocast_dtype("cuda")
    run_dry(lambda x, weight: torch.utils.checkpoint.checkpoint(F.linear, x, weight, use_reentrant=False))
    assert torch.get_autocast_dtype("cuda") == before


@pytest.mark.parametrize("part", ["graph", "holders"])
def test_without_a_private_part_a_plan_is_no_smaller(part):
    config = {"num_tokens": 64, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "causal": True}
    options = {"batch_size": 1, "seq_len": 128, "device": "cuda"}
    expected = plan(config, **options)
    with taken_away(part):
        made = plan(config, **options)
    assert made.peak_bytes >= expected.peak_bytes
    assert made.flops == expected.flops


def test_without_fake_tensors_planning_is_refused():
    with taken_away("fake_tensors"), pytest.raises(NotImplementedError, match="fake tensors"):
        plan({"num_tokens": 8, "dim": 8, "depth": 1}, batch_size=1, seq_len=8, device="cpu")


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "drop",
    [
        lambda x, p: torch.dropout(x, p, True),
        lambda x, p: torch.dropout(x, p, train=True),
        lambda x, p: torch.dropout(input=x, p=p, train=True),
        lambda x, p: F.dropout(x, p),
        lambda x, p: nn.Dropout(p)(x),
    ],
)
def test_dropout_by_any_of_its_names(drop, p):
    made = run_dry(lambda x, weight: drop(x @ weight, p))
    assert any("native_dropout" in operation.name for operation in made.operations) is (p == 0.1)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.softmax(h, -1, torch.float32),
        lambda h: h.softmax(-1, torch.float32),
        lambda h: torch.sum(dim=-1, input=h),
        lambda h: torch.cumsum(h, 0, dtype=torch.float32),
    ],
)
def test_a_dtype_may_be_given_by_place(function):
    def called(x, weight):
        out = function(x @ weight)
        assert out.dtype == torch.float32
        return out

    run_dry(called, autocast=torch.bfloat16)
