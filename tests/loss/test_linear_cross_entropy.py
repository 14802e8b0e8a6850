"""The chunked loss against the plain one: values, gradients and dtypes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch.loss.chunk import ChunkLoss, Settings
from memory_efficient_attention_pytorch.loss.linear_cross_entropy import linear_cross_entropy
from memory_efficient_attention_pytorch.torch_internals import taken_away
from tests.agreement import difference
from tests.loss.problems import assert_as_good_as_plain, outcome, plain, problem

LOW = [torch.bfloat16, torch.float16]


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
