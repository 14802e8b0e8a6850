"""The chunked loss against the plain one: values, gradients and dtypes, what it computes and holds, what it refuses."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak
from memory_efficient_attention_pytorch.common.products import PART
from memory_efficient_attention_pytorch.loss.chunk import ChunkLoss, Settings
from memory_efficient_attention_pytorch.loss.linear_cross_entropy import default_chunk_size, linear_cross_entropy
from memory_efficient_attention_pytorch.torch_internals import taken_away
from tests.agreement import difference
from tests.memory.live_bytes import LiveBytes, saved_bytes

# What a path may lose beyond the plain computation in the same dtype, relative to the largest value.
EPSILON = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
LOW = [torch.bfloat16, torch.float16]


def plain(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    class_weights=None,
    scale=1.0,
    softcap=None,
    z_loss=0.0,
    chunk_size=None,
    **options,
):
    logits, labels_of_all = scale * F.linear(hidden, weight, bias).flatten(0, -2), labels.flatten()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    of_classes = None if class_weights is None else class_weights.to(logits.dtype)
    loss = F.cross_entropy(logits, labels_of_all, weight=of_classes, **options)
    if z_loss:
        counted = labels_of_all != options.get("ignore_index", -100)
        squares = z_loss * logits.logsumexp(-1).square() * counted
        reduction = options.get("reduction", "mean")
        loss = loss + {"none": squares, "sum": squares.sum(), "mean": squares.sum() / counted.sum()}[reduction]
    return loss.view(labels.shape) if options.get("reduction") == "none" else loss


def problem(shape=(3, 17), width=12, vocabulary=29, dtype=torch.float32, bias=True, ignored=0.25, ignore_index=-100):
    """Differentiable hidden, weight, bias (or None), and labels of which some are ignored."""
    hidden = torch.randn(*shape, width)
    weight = torch.randn(vocabulary, width) / math.sqrt(width)
    labels = torch.randint(vocabulary, shape)
    labels[torch.rand(shape) < ignored] = ignore_index
    tensors = [hidden, weight, torch.randn(vocabulary)] if bias else [hidden, weight]
    hidden, weight, *rest = (x.to(dtype).requires_grad_() for x in tensors)
    return hidden, weight, rest[0] if rest else None, labels


def outcome(function, hidden, weight, bias, labels, *, incoming=None, dtype=None, **options):
    """The loss and every gradient, computed on copies, in another dtype if one is given."""
    copies = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden, weight, bias)]
    loss = function(copies[0], copies[1], labels, bias=copies[2], **options)
    loss.backward(torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype))
    return [loss.detach(), *(x.grad for x in copies if x is not None)]


def assert_as_good_as_plain(tensors, *, incoming=None, autocast=None, **options):
    dtype = autocast or tensors[0].dtype
    own = {name: options[name] for name in options if name != "chunk_size"}
    truth = outcome(plain, *tensors, incoming=incoming, dtype=torch.float64, **own)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        naive = outcome(plain, *tensors, incoming=incoming, **own)
        fast = outcome(linear_cross_entropy, *tensors, incoming=incoming, **options)
    for name, a, b, t in zip(("loss", "hidden", "weight", "bias"), fast, naive, truth, strict=False):
        assert a.shape == t.shape
        assert difference(a, t) <= difference(b, t) + EPSILON[dtype], name
    assert [x.dtype for x in fast[1:]] == [x.dtype for x in tensors[:3] if x is not None]
    return fast


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_equals_the_plain_loss_and_gradients(reduction, smoothing, bias, dtype):
    tensors = problem(dtype=dtype, bias=bias)
    incoming = torch.randn(3, 17) if reduction == "none" else torch.tensor(-1.7)
    fast = assert_as_good_as_plain(
        tensors, incoming=incoming, reduction=reduction, label_smoothing=smoothing, chunk_size=7
    )
    assert fast[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


CLASS_WEIGHTS = torch.linspace(0, 2.5, 29)
VARIANTS = {
    "softcap": {"softcap": 1.5},
    "wide softcap": {"softcap": 1e4},
    "scale": {"scale": 0.37},
    "class weights": {"class_weights": CLASS_WEIGHTS},
    "z-loss": {"z_loss": 0.1},
    "all": {"softcap": 2.0, "scale": -1.7, "class_weights": CLASS_WEIGHTS.double(), "z_loss": 0.02},
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_plain_loss_and_gradients(variant, dtype, smoothing, reduction):
    tensors = problem(dtype=dtype)
    incoming = torch.randn(3, 17) if reduction == "none" else torch.tensor(-1.7)
    options = {**VARIANTS[variant], "reduction": reduction, "label_smoothing": smoothing, "chunk_size": 7}
    assert_as_good_as_plain(tensors, incoming=incoming, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_bf16_are_as_exact_as_the_plain_loss_on_average(variant):
    excess = []
    for _ in range(12):
        tensors, incoming = problem(dtype=torch.bfloat16), torch.tensor(-1.7)
        truth = outcome(plain, *tensors, incoming=incoming, dtype=torch.float64, **VARIANTS[variant])
        naive = outcome(plain, *tensors, incoming=incoming, **VARIANTS[variant])
        fast = outcome(linear_cross_entropy, *tensors, incoming=incoming, chunk_size=7, **VARIANTS[variant])
        excess.append([difference(a, t) - difference(b, t) for a, b, t in zip(fast, naive, truth, strict=True)])
    assert (torch.tensor(excess).mean(0) <= 2.0**-11).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_when_gradients_wait_for_an_accumulating_backward(variant):
    hidden, weight, bias, labels = problem(dtype=torch.float64, shape=(2, 10))
    options = {**VARIANTS[variant], "label_smoothing": 0.2}
    truth = outcome(plain, hidden, weight, bias, labels, **options)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    held = leaves[1].grad
    linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **options).backward()
    assert leaves[1].grad is held
    for leaf, true in zip(leaves, truth[1:], strict=True):
        torch.testing.assert_close(leaf.grad - 1, true)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_at_the_end_of_a_reversible_chain(variant):
    from memory_efficient_attention_pytorch import FeedForward, ReversibleSequence
    from memory_efficient_attention_pytorch.loss.reversible import normed_sum

    _, weight, bias, labels = problem(dtype=torch.float64)
    blocks = ReversibleSequence([(FeedForward(12, 2), FeedForward(12, 2)) for _ in range(2)]).double()
    norm, x = torch.nn.LayerNorm(12).double(), torch.randn(3, 17, 12, dtype=torch.float64, requires_grad=True)
    options = {**VARIANTS[variant], "label_smoothing": 0.2, "bias": bias}
    leaves = (x, weight, bias, *norm.parameters(), *blocks.parameters())
    loss = linear_cross_entropy(normed_sum(norm, *blocks.streams(x)), weight, labels, chunk_size=7, **options)
    truth = plain(norm(blocks(x)), weight, labels, **options)
    torch.testing.assert_close(loss, truth)
    found, true = (torch.autograd.grad(value, leaves) for value in (loss, truth))
    for ours, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_mean_over_a_given_count_is_a_sum_divided():
    hidden, weight, _, labels = problem(dtype=torch.float64, bias=False)
    halves = [linear_cross_entropy(h, weight, y, reduction="sum") / 40 for h, y in zip(hidden, labels, strict=True)]
    torch.testing.assert_close(sum(halves), plain(hidden, weight, labels, reduction="sum") / 40)


def test_classes_of_no_weight_alone_give_the_loss_0():
    hidden, weight, _, labels = problem(bias=False, dtype=torch.float64)
    options = {"class_weights": torch.zeros(29), "z_loss": 0.1}
    assert linear_cross_entropy(hidden, weight, labels, class_weights=torch.zeros(29)).item() == 0
    counted = labels != -100
    squares = F.linear(hidden, weight).logsumexp(-1).square()[counted]
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, **options), 0.1 * squares.mean())


def test_saturated_and_far_logits_have_finite_gradients():
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.5, 0.5]], requires_grad=True)
    for softcap in (30.0, 500.0):
        tensors = (hidden, weight, None, torch.tensor([0, 0]))
        found = assert_as_good_as_plain(tensors, softcap=softcap, label_smoothing=0.1)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("autocast", LOW, ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(reduction, autocast, hidden_dtype):
    hidden, *others = problem(shape=(130,), width=40, vocabulary=300)
    tensors = (hidden.detach().to(hidden_dtype).requires_grad_(), *others)
    incoming = torch.rand(130) if reduction == "none" else torch.tensor(0.5)
    fast = assert_as_good_as_plain(tensors, incoming=incoming, autocast=autocast, reduction=reduction, chunk_size=32)
    assert fast[0].dtype == torch.float32


def test_autocast_uses_its_dtype_and_leaves_fp64_alone():
    hidden, weight, _, labels = problem(bias=False)
    exact = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, labels)
        double = linear_cross_entropy(hidden.double(), weight.double(), labels)
    assert 1e-6 < abs(exact - rounded).item() < 1e-1
    assert double.dtype == torch.float64
    assert abs(exact - double).item() < 1e-6


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 1, 3), ()], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 507])
def test_odd_shapes(shape, vocabulary):
    tensors = problem(shape=shape, width=3, vocabulary=vocabulary, ignored=0)
    for reduction in ("none", "mean"):
        fast = outcome(linear_cross_entropy, *tensors, reduction=reduction)
        hidden, weight, bias, labels = tensors
        truth = outcome(plain, hidden.reshape(-1, 3), weight, bias, labels.reshape(-1), dtype=torch.float64)
        if reduction == "mean":
            assert all(difference(a.view(t.shape), t) < 1e-5 for a, t in zip(fast, truth, strict=True))
        else:
            assert fast[0].shape == shape
            torch.testing.assert_close(fast[0].mean().double(), truth[0])


def test_strided_tensors():
    hidden, weight, bias, labels = problem(dtype=torch.float64)
    turned = (hidden.detach().mT.contiguous().mT, weight.detach().T.contiguous().T, bias.detach())
    spread = labels.repeat_interleave(2, dim=1)[:, ::2]
    assert not any(x.is_contiguous() for x in (*turned[:2], spread))
    for reduction in ("none", "mean"):
        truth = outcome(plain, hidden, weight, bias, labels, reduction=reduction)
        fast = outcome(linear_cross_entropy, *turned, spread, reduction=reduction, chunk_size=7)
        assert all(difference(a, b) < 1e-13 for a, b in zip(fast, truth, strict=True))


@given(chunk_size=st.integers(1, 60), tokens=st.integers(1, 50), seed=st.integers(0, 99))
def test_chunk_size_changes_nothing(chunk_size, tokens, seed):
    torch.manual_seed(seed)
    tensors = problem(shape=(tokens,), dtype=torch.float64, ignored=0.4)
    for reduction in ("none", "mean"):
        whole = outcome(linear_cross_entropy, *tensors, reduction=reduction, chunk_size=tokens)
        parts = outcome(linear_cross_entropy, *tensors, reduction=reduction, chunk_size=chunk_size)
        assert all(difference(a, b) < 1e-13 for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("variant", ["plain", *VARIANTS])
def test_gradcheck(reduction, smoothing, variant):
    hidden, weight, bias, labels = problem(shape=(5,), width=3, vocabulary=4, dtype=torch.float64)
    labels[0], labels[1] = -100, 2

    def loss(hidden, weight, bias):
        options = {"bias": bias, "reduction": reduction, "label_smoothing": smoothing, "chunk_size": 2}
        options |= VARIANTS.get(variant, {})
        if "class_weights" in options:
            options["class_weights"] = options["class_weights"][8:12]
        return linear_cross_entropy(hidden, weight, labels, **options)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("tokens", [0, 9])
def test_no_label_that_counts(reduction, tokens):
    hidden, weight, bias, labels = problem(shape=(tokens,), ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction, chunk_size=4)
    assert loss.requires_grad
    assert torch.equal(loss, torch.zeros(tokens if reduction == "none" else ()))
    loss.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (hidden, weight, bias))


def test_ignored_index_may_be_a_word():
    tensors = problem(ignore_index=3, ignored=0.5)
    assert_as_good_as_plain(tensors, ignore_index=3, chunk_size=5)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.5, 0.5]], requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]), reduction="none")
    assert losses.tolist() == [0.0, 2e4]
    losses.sum().backward()
    assert torch.equal(hidden.grad, torch.tensor([[0.0, 0.0], [-2.0, 2.0]]))


def test_uninitialised_memory_is_not_read():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for dtype in (torch.float32, torch.bfloat16):
            assert_as_good_as_plain(problem(dtype=dtype), label_smoothing=0.1, chunk_size=5)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_pytorch_that_does_not_tell_whether_the_graph_is_kept():
    hidden, weight, bias, labels = problem()
    truth = outcome(linear_cross_entropy, hidden, weight, bias, labels)[1:]
    with taken_away("keeps_graph"):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
        for retain_graph in (True, False):
            found = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=retain_graph)
            assert all(torch.equal(x, y) for x, y in zip(found, truth, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tied_weight_checkpoint_and_offloaded_tensors(reduction):
    """The weight may be the embedding too, the loss may be recomputed, and what is kept may be kept elsewhere."""
    table = torch.randn(29, 12, dtype=torch.float64, requires_grad=True)
    words, labels = torch.randint(29, (2, 9)), torch.randint(29, (2, 9))

    def loss(function):
        return function(F.embedding(words, table), table, labels, reduction=reduction).sum()

    (truth,) = torch.autograd.grad(loss(plain), table)
    (tied,) = torch.autograd.grad(loss(linear_cross_entropy), table)
    recomputed = checkpoint(loss, linear_cross_entropy, use_reentrant=False)
    (checkpointed,) = torch.autograd.grad(recomputed, table)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        elsewhere = loss(lambda *args, **options: linear_cross_entropy(*args, **options))
    (offloaded,) = torch.autograd.grad(elsewhere, table)
    for gradient in (tied, checkpointed, offloaded):
        torch.testing.assert_close(gradient, truth)


def test_gradients_too_small_for_fp16_survive_until_a_loss_scaler_lifts_them():
    hidden, weight, _, labels = problem(shape=(2**14,), width=8, vocabulary=64, dtype=torch.float16, bias=False)
    scale = 2.0**14
    truth = outcome(plain, hidden, weight, None, labels, dtype=torch.float64)
    fast = outcome(linear_cross_entropy, hidden, weight, None, labels, incoming=torch.tensor(scale))
    for gradient, exact in zip(fast[1:], truth[1:], strict=True):
        assert difference(gradient / scale, exact) < 2.0**-10
    assert (truth[1].abs().mean() < 2.0**-14).item()  # which the smallest normal fp16 number exceeds


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


# Without values, and recorded.


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


def test_a_recorded_run_has_every_chunk():
    hidden, weight, _, labels = (None if x is None else x.detach() for x in problem(shape=(40,), bias=False))
    options = {"reduction": "none", "chunk_size": 10}
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (hidden, weight, labels)]
    recorded = make_fx(lambda h, w, y: linear_cross_entropy(h, w, y, **options))(*fake)
    torch.testing.assert_close(recorded(hidden, weight, labels), plain(hidden, weight, labels, reduction="none"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_run_has_every_chunk(strict):
    hidden, weight, _, labels = (None if x is None else x.detach() for x in problem(shape=(40,), bias=False))

    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, labels):
            return linear_cross_entropy(hidden, weight, labels, chunk_size=10)

    with torch.no_grad():
        exported = torch.export.export(Loss(), (hidden, weight, labels), strict=strict).module()
        torch.testing.assert_close(exported(hidden, weight, labels), plain(hidden, weight, labels))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_into_one_graph(reduction):
    tensors = problem()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*args, **options):
        return linear_cross_entropy(*args, **options)

    eager = outcome(linear_cross_entropy, *tensors, reduction=reduction, chunk_size=20)
    traced = outcome(compiled, *tensors, reduction=reduction, chunk_size=20)
    assert all(difference(a, b.double()) < 1e-6 for a, b in zip(traced, eager, strict=True))


def test_chunk_by_chunk_with_a_norm_made_just_before():
    hidden, weight, _, labels = problem(shape=(20,), dtype=torch.float64, bias=False, ignored=0)
    truth = outcome(plain, F.layer_norm(hidden, (12,)), weight, None, labels, reduction="sum")
    with torch.no_grad():
        grad_weight = torch.zeros_like(weight)
        settings = Settings(-100, 0.0, "sum", 6, torch.float64)
        chunks = ChunkLoss(settings, weight, None, (grad_weight, None), rows=6)
        total = torch.zeros((), dtype=torch.float64)
        for rows, targets in zip(hidden.split(6), labels.split(6), strict=True):
            normed = F.layer_norm(rows, (12,))
            total += chunks.losses(normed, targets).sum()
            chunks.add_gradients(normed, targets, torch.ones(len(rows), dtype=torch.float64), of_hidden=False)
    torch.testing.assert_close(total, truth[0])
    torch.testing.assert_close(grad_weight, truth[2])


# Mistakes.


@pytest.mark.parametrize("label", [29, -1, 10**9])
def test_a_label_out_of_range(label):
    hidden, weight, bias, labels = problem()
    labels[2, 5] = label
    with pytest.raises(ValueError, match=rf"labels: expected each in \[0, 29\) or ignore_index, -100, got {label}"):
        linear_cross_entropy(hidden, weight, labels, bias=bias)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", {"hidden": torch.zeros(3, 17, 12, dtype=torch.int64)}),
        ("weight", {"weight": torch.zeros(29, 13)}),
        ("weight", {"weight": torch.zeros(29)}),
        ("weight", {"weight": torch.zeros(0, 12), "bias": None}),
        ("weight", {"weight": torch.zeros(29, 12, dtype=torch.float64)}),
        ("weight", {"weight": torch.zeros(29, 12, device="meta")}),
        ("labels", {"labels": torch.zeros(3, 16, dtype=torch.int64)}),
        ("labels", {"labels": torch.zeros(3, 17)}),
        ("labels", {"labels": torch.zeros(3, 17, dtype=torch.int32)}),
        ("bias", {"bias": torch.zeros(28)}),
        ("bias", {"bias": torch.zeros(29, dtype=torch.bfloat16)}),
        ("reduction", {"reduction": "batchmean"}),
        ("label_smoothing", {"label_smoothing": 1.5}),
        ("label_smoothing", {"label_smoothing": -0.1}),
        ("chunk_size", {"chunk_size": 0}),
        ("class_weights", {"class_weights": torch.ones(28)}),
        ("class_weights", {"class_weights": torch.ones(29, dtype=torch.int64)}),
        ("class_weights", {"class_weights": torch.ones(29, requires_grad=True)}),
        ("class_weights", {"class_weights": [1.0] * 29}),
        ("scale", {"scale": math.inf}),
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": -30.0}),
        ("z_loss", {"z_loss": -1e-4}),
        ("chunk_size", {"chunk_size": 2.0}),
    ],
    ids=str,
)
def test_mistakes_are_named(name, change):
    right = dict(zip(("hidden", "weight", "bias", "labels"), problem(), strict=True))
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        linear_cross_entropy(**{**right, **change})


def test_autocast_refuses_what_it_would_not_convert():
    hidden, weight, _, labels = problem(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"^weight: expected a dtype"):
        linear_cross_entropy(hidden, weight.double(), labels)
