"""Tiles whose products oneDNN adds in place: packed products, which questions get them, what they compute and hold."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from memory_efficient_attention_pytorch import AlibiBias, RelativePositionBias, dot_product_attention, select_backend
from memory_efficient_attention_pytorch.attention import onednn as way
from memory_efficient_attention_pytorch.common import products
from memory_efficient_attention_pytorch.common.products import PackedWeight, product
from tests import reference
from tests.memory.live_bytes import LiveBytes

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"),
    pytest.mark.usefixtures("onednn_is_faster"),
]
MIB = 2**20


def qkv(n, m=None, *, h=1, kv=None, d=32, e=None, dtype=torch.float32):
    shapes = ((1, h, n, d), (1, kv or h, m or n, d), (1, kv or h, m or n, e or d))
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "sizes", [(64, 128, 32), (192, 64, 40), (64, 40, 128), (64, 8, 64), (65, 128, 32), (64, 64, 7)]
)
@pytest.mark.parametrize("side", [0, 1])
def test_a_packed_weight_adds_its_product_in_place(sizes, side, transposed):
    """Multiples of 64 by oneDNN, others by PyTorch's own product."""
    n, k, j = sizes
    length = (j, k)[side]
    weight = torch.randn(k, j).t() if transposed else torch.randn(j, k)
    values, total = torch.randn(n, k), torch.randn(n, j)
    truth = total.double() + values.double() @ weight.double().t()
    place = total.data_ptr()
    with LiveBytes() as count:
        PackedWeight(weight, length=length, rows=n).add_product(total, values)
    assert total.data_ptr() == place
    reference.assert_close("total", total, truth, 1e-5)
    assert count.calls["_convolution_pointwise_"] == (n % 64 == 0 and length % 64 == 0)


def test_a_packed_weight_adds_within_a_larger_tensor_only_where_it_should():
    whole = torch.ones(256, 64)
    PackedWeight(torch.ones(64, 128), length=64, rows=64).add_product(whole[64:128], torch.ones(64, 128))
    assert whole[64:128].eq(129).all()
    assert whole[:64].eq(1).all()
    assert whole[128:].eq(1).all()


def test_a_packed_weight_takes_half_precision_without_rounding_again():
    weight, values = torch.randn(64, 64).bfloat16(), torch.randn(64, 64)
    for rows in (64, 63):
        total = torch.zeros(rows, 64)
        PackedWeight(weight, length=64, rows=rows).add_product(total, values[:rows])
        reference.assert_close("total", total, values[:rows].double() @ weight.double().t(), 1e-5)


@pytest.mark.parametrize("sizes", [(40, 128, 64), (40, 100, 64)])
def test_product_by_a_matrix_in_either_order(sizes):
    n, k, j = sizes
    values, weight = torch.randn(n, k), torch.randn(j, k)
    truth = values.double() @ weight.double().t()
    for ordered in (weight, weight.t().contiguous().t()):
        reference.assert_close("product", product(values, ordered), truth, 1e-5)


def test_operations_are_counted():
    with FlopCounterMode(display=False) as count:
        PackedWeight(torch.randn(128, 64), length=128, rows=64).add_product(torch.zeros(64, 128), torch.randn(64, 64))
    assert count.get_total_flops() == 2 * 64 * 64 * 128


def test_fake_tensors_go_the_same_way():
    with FakeTensorMode(), FlopCounterMode(display=False) as count:
        total = torch.zeros(64, 128)
        PackedWeight(torch.randn(128, 64), length=128, rows=64).add_product(total, torch.randn(64, 64))
    assert total.shape == (64, 128)
    assert count.get_total_flops() == 2 * 64 * 64 * 128


# Which questions


def test_auto_prefers_them_to_the_kernel_for_long_sequences(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    choice = select_backend(*qkv(2048), causal=True)
    assert choice.name == "tiled"
    assert "oneDNN" in choice.ruled_out["fused"]
    assert select_backend(*qkv(1024), causal=True).name == "fused"
    assert select_backend(*qkv(2048, d=16), causal=True).name == "fused"
    assert select_backend(*qkv(2048, dtype=torch.float64), causal=True).name == "fused"
    assert select_backend(*qkv(1, 2**20)).name == "fused"


def test_not_for_many_threads_nor_where_another_library_is_as_fast(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: way.MOST_THREADS + 1)
    assert select_backend(*qkv(2048)).name == "fused"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert select_backend(*qkv(2048)).name == "tiled"
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert select_backend(*qkv(2048)).name == "fused"


def test_not_where_each_head_would_find_anew_what_one_pass_finds_for_all(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    q, k, v = qkv(2048, h=2)
    documents = (torch.arange(2048) // 500)[None]
    several = {"document_ids": documents}, {"mask": lambda b, h, i, j: i >= j}, {"attn_bias": RelativePositionBias(2)}
    for kwargs in several:
        assert select_backend(q, k, v, **kwargs).way == "cpu_kernel"
    for kwargs in ({"mask": documents > 0}, {"attn_bias": AlibiBias(2)}, {"attn_bias": torch.randn(1, 1, 1, 2048)}):
        assert select_backend(q, k, v, **kwargs).way == "onednn"
    wide = [torch.zeros(1, 2, 2048, way.WIDE) for _ in range(3)]
    assert select_backend(*wide, document_ids=documents).way == "onednn"


def test_backward_goes_the_way_of_forward_whatever_changed_between(monkeypatch):
    """Dropout's masks follow the cut into heads: another cut would drop others."""
    q, k, v = qkv(70, h=4)

    def gradients(between):
        torch.manual_seed(5)
        out = dot_product_attention(q, k, v, dropout=0.4, backend="onednn", q_bucket_size=16, k_bucket_size=32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_num_threads", between)
            return torch.autograd.grad(out.sum(), (q, k, v))

    for few, many in zip(gradients(lambda: 1), gradients(lambda: 64), strict=True):
        assert few.equal(many)


# What they compute: small questions are the conformance suite's; here tiles that oneDNN's kernels take


def test_a_dropout_mask_does_not_depend_on_the_cut(monkeypatch):
    """A recomputation under other settings (threads, say) drops the same weights: in a reversible block, or kept."""
    q, k, v = qkv(2048, h=2)

    def out(threads):
        torch.manual_seed(5)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return dot_product_attention(q, k, v, dropout=0.4, backend="tiled")

    with LiveBytes() as count:
        few = out(1)
    assert count.calls["_convolution_pointwise_"]
    with LiveBytes() as count:
        many = out(way.MOST_THREADS + 1)
    assert not count.calls["_convolution_pointwise_"]
    reference.assert_close("out", many, few.double(), 1e-5)


def test_other_kinds_of_tensors_go_their_own_way(monkeypatch):
    """functorch's transforms, and subclasses, have rules for PyTorch's operators, not for these."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    class Other(torch.Tensor):
        pass

    q, k, v = (x.detach() for x in qkv(2048))
    assert select_backend(q.as_subclass(Other), k, v, causal=True).name == "fused"
    grad = torch.func.grad(lambda x: dot_product_attention(x, k, v, causal=True).sum())(q)
    leaf = q.clone().requires_grad_()
    (truth,) = torch.autograd.grad(dot_product_attention(leaf, k, v, causal=True).sum(), leaf)
    reference.assert_close("dq", grad, truth.double(), 1e-4)


def test_scores_that_rise_with_a_bias_are_computed_once():
    q, k, v = (x.detach() for x in qkv(128, 1024))
    bias = torch.arange(1024.0)[None, None, None] * -0.03  # tiles are computed from the last to the first
    with LiveBytes() as count:
        out = dot_product_attention(q, k, v, attn_bias=bias, backend="onednn", k_bucket_size=128)
    truth = dot_product_attention(q.double(), k.double(), v.double(), attn_bias=bias.double(), backend="naive")
    reference.assert_close("out", out, truth, 1e-5)
    assert count.products == 2 * 8


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"causal": True},
        {"window": (300, 100)},
        {"window": 0},
        {"mask": True},
        {"documents": True, "causal": True},
        {"bias": True, "causal": True},
        {"dropout": 0.3},
        {"dropout": 0.3, "bias": True, "mask": True},
        {"kv": 1, "causal": True},
        {"m": 640, "causal": True},
        {"n": 500, "m": 700},
        {"e": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_and_gradients_against_the_naive_backend(dtype, kwargs):
    kwargs = dict(kwargs)
    n, m = kwargs.pop("n", 512), kwargs.pop("m", kwargs.pop("n", 512))
    q, k, v = qkv(n, m, h=2, kv=kwargs.pop("kv", None), e=kwargs.pop("e", None), dtype=dtype)
    if kwargs.pop("mask", False):
        kwargs["mask"] = torch.rand(1, m) > 0.3
    if kwargs.pop("documents", False):
        kwargs["document_ids"] = (torch.arange(m) // 200)[None]
    wanted = (q, k, v)
    if kwargs.pop("bias", False):
        kwargs["attn_bias"] = torch.randn(1, 2, n, m).to(dtype).requires_grad_()
        wanted = (*wanted, kwargs["attn_bias"])
    cotangent = torch.randn(1, 2, n, v.shape[-1]).to(dtype)
    found = []
    for backend in ("onednn", "naive"):
        torch.manual_seed(7)
        buckets = {"q_bucket_size": 128, "k_bucket_size": 192}
        out, lse = dot_product_attention(q, k, v, backend=backend, return_lse=True, **buckets, **kwargs)
        loss = (out * cotangent).sum() + lse.masked_fill(lse == -torch.inf, 0.0).square().sum()
        found.append([out, lse, *torch.autograd.grad(loss, wanted)])
    tolerance = 2e-5 if dtype == torch.float32 else 3 * reference.EPSILON[dtype]
    for name, ours, truth in zip(("out", "lse", "dq", "dk", "dv", "dbias"), *found, strict=False):
        reference.assert_close(name, ours, truth.double(), tolerance)


def test_half_precision_is_rounded_at_the_ends_only():
    """The log-sum-exp, fp32, of bf16 queries and keys is exact to fp32."""
    q, k, v = qkv(256, dtype=torch.bfloat16)
    _, lse = dot_product_attention(q, k, v, return_lse=True, backend="onednn")
    truth = (q.double() @ k.double().mT * 32**-0.5).logsumexp(-1)
    torch.testing.assert_close(lse.double(), truth, rtol=1e-6, atol=1e-6)


def test_large_scores_do_not_overflow():
    """Each row's largest score, hidden ones aside, becomes a weight of 1."""
    q, k, v = (x.detach() for x in qkv(128, d=32))
    out = dot_product_attention(q * 1e3, k, v, causal=True, backend="onednn")
    truth = dot_product_attention(q.double() * 1e3, k.double(), v.double(), causal=True, backend="naive")
    reference.assert_close("out", out, truth, 1e-3)


def test_scores_that_a_rounded_log_sum_exp_cannot_tell_apart_are_refused():
    """Its backward keeps the log-sum-exp in fp32, and gave gradients of 0."""
    q, k, v = (x.detach() for x in qkv(128, d=32))
    with pytest.raises(NotImplementedError, match=r"backend: 'onednn' .*scores of q and k may exceed 65536"):
        dot_product_attention(q * 1e6, k, v, backend="onednn")


@pytest.mark.parametrize("growth", [0.0, 0.5, 8.0, 500.0])
def test_later_tiles_with_larger_scores(growth):
    """The first tile's largest scores serve the later tiles, unless those exceed them by far."""
    q, k, v = (x.detach() for x in qkv(128, 1024))
    k *= 1 + growth * (torch.arange(1024) // 128)[:, None]
    with LiveBytes() as count:
        out, lse = dot_product_attention(q, k, v, return_lse=True, backend="onednn", k_bucket_size=128)
    truth = dot_product_attention(q.double(), k.double(), v.double(), return_lse=True, backend="naive")
    reference.assert_close("out", out, truth[0], 1e-5 if growth < 100 else 1e-3)
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-5)
    assert (count.products == 2 * 8) == (growth == 0.0)


def test_a_row_that_sees_nothing_at_first():
    q, k, v = (x.detach() for x in qkv(128, 512))
    mask = torch.ones(1, 1, 128, 512, dtype=torch.bool)
    mask[..., 3, :400] = mask[..., 5, :] = False
    out = dot_product_attention(q, k, v, mask=mask, backend="onednn", k_bucket_size=128)
    truth = dot_product_attention(q.double(), k.double(), v.double(), mask=mask, backend="naive")
    reference.assert_close("out", out, truth, 1e-5)
    assert out[0, 0, 5].eq(0).all()


# What they hold


def test_a_window_keeps_only_the_keys_in_sight():
    """Packed keys and values of buckets that no row will see again are let go."""

    def peak(n):
        q, k, v = (x.detach() for x in qkv(n))
        with LiveBytes() as count:
            dot_product_attention(
                q, k, v, causal=True, window=(128, 0), backend="onednn", q_bucket_size=64, k_bucket_size=64
            )
        return count.peak - n * 4 * 33  # the output and the log-sum-exp

    assert peak(4096) <= 1.1 * peak(1024)


def test_memory_of_the_tiles_themselves():
    """Two tiles of scores, the masks of a few, one head's gradients of keys and values: whatever the heads' number."""

    def above(h):
        q, k, v = qkv(2048, h=h, d=32)
        each = q.nbytes
        with LiveBytes() as count:
            out = dot_product_attention(q, k, v, causal=True, backend="tiled")
            torch.autograd.grad(out.sum(), (q, k, v))
        # Output, its gradient and those of q, k and v, which sum() expands without a copy of its own.
        return count.peak - 5 * each

    assert above(2) <= 7.5 * MIB
    assert above(8) <= above(2) + 1 * MIB


def test_each_row_has_the_same_bits_whatever_the_other_rows_hold():
    q, k, v = torch.randn(1, 1, 64, 32), torch.randn(1, 1, 512, 32), torch.randn(1, 1, 512, 32)
    k *= 1 + torch.arange(512)[:, None] / 512  # scores rise a little from tile to tile
    other = q.clone()
    other[:, :, 7] *= 50
    options = {"backend": "onednn", "k_bucket_size": 64, "return_lse": True}
    for one, two in zip(
        dot_product_attention(q, k, v, **options), dot_product_attention(other, k, v, **options), strict=True
    ):
        assert not one[:, :, 7].equal(two[:, :, 7])
        rest = torch.arange(64) != 7
        assert one[:, :, rest].equal(two[:, :, rest])


@pytest.mark.parametrize("kv", [1, 4])
def test_heads_as_projections_hand_them_over(kv):
    """(b, n, h·d) transposed, at lengths that oneDNN's own kernels take."""
    leaves = [torch.randn(1, 128, h * 32).double().requires_grad_() for h in (4, kv, kv)]

    def run(dtype, backend):
        q, k, v = (x.to(dtype).unflatten(-1, (-1, 32)).transpose(1, 2) for x in leaves)
        out = dot_product_attention(q, k, v, backend=backend, causal=True, q_bucket_size=64, k_bucket_size=64)
        return torch.autograd.grad(out.double().square().sum(), leaves)

    for ours, true in zip(run(torch.float32, "onednn"), run(torch.float64, "naive"), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)
