"""What the loss computes and holds."""

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak
from memory_efficient_attention_pytorch.common.products import PART
from memory_efficient_attention_pytorch.loss.linear_cross_entropy import default_chunk_size, linear_cross_entropy
from tests.loss.problems import plain, problem
from tests.memory.live_bytes import LiveBytes, saved_bytes

# Which products are computed: per chunk one for the logits, one for hidden's gradient, one for the weight's.


def calls(reduction, frozen=(), grad=True):
    tensors = dict(zip(("hidden", "weight", "bias", "labels"), problem(shape=(40,)), strict=True))
    for name in frozen:
        tensors[name] = tensors[name].detach()
    with LiveBytes() as forward, torch.set_grad_enabled(grad):
        loss = linear_cross_entropy(**tensors, reduction=reduction, chunk_size=10).sum()
    with LiveBytes() as backward:
        if loss.requires_grad:
            loss.backward()
    for name in frozen:
        assert tensors[name].grad is None
    return tuple(sum(live.calls[name] for name in ("mm", "addmm_", "addmv_")) for live in (forward, backward))


@pytest.mark.parametrize(
    ("frozen", "gradients"),
    [((), 3), (("weight", "bias"), 1), (("hidden", "bias"), 1), (("hidden", "weight"), 1), (("bias",), 2)],
    ids=str,
)
def test_only_the_gradients_asked_for_are_computed(frozen, gradients):
    assert calls("mean", frozen) == (4 * (1 + gradients), 0)
    assert calls("none", frozen) == (4, 4 * (1 + gradients))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_gradient_no_gradient_work(reduction):
    assert calls(reduction, grad=False) == (4, 0)
    assert calls(reduction, frozen=("hidden", "weight", "bias")) == (4, 0)
    hidden, weight, bias, labels = problem()
    with torch.inference_mode():
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction),
            plain(hidden, weight, labels, bias=bias, reduction=reduction),
        )


# What is held: tokens, width, vocabulary and chunk are chosen so that every buffer has a size of its own.
N, D, V, C = 1024, 64, 2048, 32


PER_TOKEN = 64 * N  # labels, losses and weights of the tokens: a few numbers each


def big(dtype=torch.float32):
    return problem(shape=(N,), width=D, vocabulary=V, dtype=dtype, bias=False)


def test_holds_one_chunk_of_logits_and_the_two_gradients():
    hidden, weight, _, labels = big()
    with LiveBytes() as forward:
        loss = linear_cross_entropy(hidden, weight, labels, chunk_size=C)
    assert forward.peak <= 4 * (C * V + N * D + V * D) + PER_TOKEN
    assert forward.live <= 4 * (N * D + V * D) + PER_TOKEN
    del forward
    with LiveBytes() as backward:
        loss.backward()
    assert backward.peak <= PER_TOKEN  # scaled in place, and handed over
    assert weight.grad is not None


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.5, "z_loss": 0.1}, {"class_weights": torch.linspace(0, 1, V)}, {"softcap": 5.0}],
    ids=["scale and z-loss", "class weights", "softcap"],
)
def test_variants_hold_no_second_chunk_of_logits(options):
    hidden, weight, _, labels = big()
    with LiveBytes() as forward:
        linear_cross_entropy(hidden, weight, labels, chunk_size=C, label_smoothing=0.1, **options)
    # Capped logits are worked on in sixteenths of a chunk, with two buffers beside them.
    assert forward.peak <= 4 * (C * V + N * D + V * D) + PER_TOKEN + 4 * 2 * (C // 16 + 1) * V


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_is_that_of_what_it_holds():
    """Of a whole process: one chunk of logits and the gradients, the matrix library's buffers, and no logits."""
    script = Path(__file__).parents[2] / "benchmarks" / "linear_cross_entropy.py"
    tokens, width, vocabulary = 1024, 256, 16000
    shape = {"chunk_sizes": [], "tokens": tokens, "width": width, "vocabulary": vocabulary, "dtype": "float32"}

    def mebibytes(name):
        return measure_peak(f"{script}:build", {"name": name, **shape}, threads=1).peak_bytes / 2**20

    chunk = default_chunk_size(vocabulary, torch.device("cpu"))
    held = 4 * (chunk * vocabulary + tokens * width + vocabulary * width) / 2**20
    assert held <= mebibytes("ours") <= held + 6
    assert mebibytes("torch, plain") >= 4 * (2 * tokens * vocabulary + vocabulary * width) / 2**20


def test_a_kept_graph_costs_a_copy_of_the_gradients():
    hidden, weight, _, labels = big()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=C)
    with LiveBytes() as backward:
        loss.backward(retain_graph=True)
    assert 4 * (N * D + V * D) <= backward.peak <= 4 * (N * D + V * D) + PER_TOKEN


def test_reduction_none_keeps_only_its_inputs():
    hidden, weight, _, labels = big()
    options = {"reduction": "none", "chunk_size": C}
    inputs = 4 * (N * D + V * D) + 8 * N
    assert saved_bytes(linear_cross_entropy, hidden, weight, labels, **options) == inputs + 4  # and the sum's factor
    losses = linear_cross_entropy(hidden, weight, labels, **options)
    with LiveBytes() as backward:
        losses.sum().backward()
    assert backward.peak <= 4 * (C * V + N * D + V * D) + PER_TOKEN


def test_without_gradients_only_the_chunk():
    hidden, weight, _, labels = big()
    with LiveBytes() as live, torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, chunk_size=C)
    assert live.peak <= 4 * C * V + PER_TOKEN


def test_low_precision_adds_its_own_chunk_and_keeps_the_sum_in_fp32():
    hidden, weight, _, labels = big(torch.bfloat16)
    with LiveBytes() as forward:
        linear_cross_entropy(hidden, weight, labels, chunk_size=C)
    block = 2 * V * D  # the whole (V, d) fits the block through which a product is added
    assert forward.peak <= (4 + 2) * C * V + 2 * N * D + 4 * V * D + block + PER_TOKEN


def test_default_chunk_is_bounded():
    cpu = torch.device("cpu")
    assert default_chunk_size(32_000, cpu) == 128
    assert default_chunk_size(256, cpu) * 256 == 2**18
    hidden, weight, _, labels = big()
    with LiveBytes() as live, torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    part = 4 * PART  # oneDNN's own copy, on CPUs where it is used
    assert 4 * 128 * V <= live.peak <= 4 * 128 * V + PER_TOKEN + part


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_dry_run_holds_what_a_real_run_holds(reduction, accumulates):
    hidden, weight, _, labels = big()
    weight.grad = torch.zeros_like(weight) if accumulates else None

    def peaks(hidden, weight, labels):
        with LiveBytes() as live:
            linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk_size=C).sum().backward()
        return live.peak

    with FakeTensorMode() as mode:  # a fake tensor has a gradient if the real one has
        fake = [mode.from_tensor(x) for x in (hidden, weight, labels)]
    real = peaks(hidden, weight, labels)
    with mode:
        assert peaks(*fake) == pytest.approx(real, abs=PER_TOKEN)
        assert [x.grad.shape for x in fake[:2]] == [hidden.shape, weight.shape]
