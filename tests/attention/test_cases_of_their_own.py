"""What calls share, which thread adds what, and either sign of the scale, each in a case of its own."""

from threading import get_ident
from time import sleep

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import MaskFunction, RelativePositionBias, dot_product_attention, select_backend
from memory_efficient_attention_pytorch.attention import onednn
from memory_efficient_attention_pytorch.attention.bias import BiasGradient
from tests.agreement import skip_unless_usable


@pytest.fixture(autouse=True)
def _usable(request):
    values = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ("onednn",)
    for way in values:
        skip_unless_usable(way if isinstance(way, str) else "")


@pytest.mark.parametrize("backend", ["products", "onednn"])
def test_sequences_that_are_computed_apart_drop_different_weights(backend):
    q = torch.randn(1, 1, 1024, 32).expand(2, 1, 1024, 32).contiguous()
    one, other = dot_product_attention(q, q, q, dropout=0.5, backend=backend, k_bucket_size=1024, q_bucket_size=1024)
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    "others", [({}, {"causal": True}), ({"causal": True}, {"causal": True, "window": (20, 0)})], ids=str
)
@pytest.mark.parametrize("backend", ["products", "cpu_kernel", "onednn"])
def test_a_mask_function_is_shared_by_calls_with_other_windows(backend, others):
    q, k, v = (torch.randn(1, 2, 96, 32) for _ in range(3))

    def function(b, h, i, j):
        return (i // 16 - j // 16) % 2 == 0

    shared = MaskFunction(function)
    for options in (*others, *others):
        ours = dot_product_attention(
            q, k, v, mask=shared, backend=backend, q_bucket_size=16, k_bucket_size=16, **options
        )
        truth = dot_product_attention(q, k, v, mask=function, backend="naive", **options)
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("backend", ["products", "cpu_kernel", "onednn"])
def test_a_mask_function_is_shared_by_calls_of_other_lengths(backend):
    def function(b, h, i, j):
        return (i // 16 - j // 16) % 2 == 0

    shared = MaskFunction(function)
    for n, m in ((48, 96), (96, 96), (96, 48), (48, 96)):
        q, k, v = torch.randn(1, 2, n, 32), torch.randn(1, 2, m, 32), torch.randn(1, 2, m, 32)
        ours = dot_product_attention(q, k, v, mask=shared, backend=backend, q_bucket_size=16, k_bucket_size=16)
        truth = dot_product_attention(q, k, v, mask=function, backend="naive")
        torch.testing.assert_close(ours, truth)


def qkv(n=5, m=6):
    return torch.zeros(2, 4, n, 8), torch.zeros(2, 2, m, 8), torch.zeros(2, 2, m, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_documents_of_the_right_shape_that_are_no_integers(dtype):
    with pytest.raises(ValueError, match="document_ids: expected an integer dtype"):
        dot_product_attention(*qkv(), document_ids=torch.zeros(2, 6, dtype=dtype))


def test_documents_of_another_batch_alone():
    for batch in (1, 3):
        with pytest.raises(ValueError, match="document_ids: expected shape"):
            dot_product_attention(*qkv(), document_ids=torch.zeros(batch, 6, dtype=torch.int64))


@pytest.mark.parametrize("window", [True, (True, 0), (0, False)])
def test_a_window_of_booleans(window):
    with pytest.raises(ValueError, match="window: expected"):
        dot_product_attention(*qkv(), window=window)


@pytest.mark.parametrize("way", ["products", "cpu_kernel", "onednn"])
def test_scores_of_a_negative_scale_are_not_taken_for_negligible(way):
    q, k, v = (torch.randn(1, 2, 512, 32) for _ in range(3))
    k[:, :, 3] = 0.0
    k[:, :, 3, 0], q[..., 0] = -600.0 * 32**0.5, 4.0

    def bias(i, j):
        return -4.0 * (i[:, None] - j).abs()

    options = {"causal": True, "attn_bias": bias, "scale": -(32**-0.5), "q_bucket_size": 64, "k_bucket_size": 64}
    ours, truth = (
        [
            out := dot_product_attention(*leaves, backend=backend, **options),
            torch.autograd.grad(out.sum(), leaves[2])[0],
        ]
        for backend, leaves in (
            (way, [x.clone().requires_grad_() for x in (q, k, v)]),
            ("naive", [x.double().requires_grad_() for x in (q, k, v)]),
        )
    )
    for mine, true in zip(ours, truth, strict=True):
        assert (mine - true).abs().max() <= 1e-3 * true.abs().max()


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_large_scores_of_either_sign_of_scale(scale):
    q, k, v = (torch.randn(1, 2, 128, 32) for _ in range(3))
    assert select_backend(q * 1e2, k * 1e2, v, scale=scale).way == "products"
    with pytest.raises(NotImplementedError, match="may exceed 65536"):
        dot_product_attention(q * 1e2, k * 1e2, v, scale=scale, backend="onednn")


def test_what_scores_can_be_is_found_of_either_sign_of_scale():
    """By the norms, where the largest values alone do not decide."""
    q, k, v = (torch.zeros(1, 1, 9, 64) for _ in range(3))
    q[..., 0], k[..., 0] = 2000.0, 50.0  # scores of 1e5 * scale; the first bound is 64 times that
    for scale, way in ((-0.1, "sdpa"), (-1.0, "products")):
        assert select_backend(q, k, v, scale=scale).way == way


def test_a_function_of_the_score_may_return_a_view_of_what_it_captures():
    table, (q, k, v) = torch.randn(1, 1, 20, 20), (torch.randn(1, 1, 20, 8) for _ in range(3))
    before = table.clone()

    def function(score, b, h, i, j):
        return table[..., int(i.min()) : int(i.max()) + 1, int(j.min()) : int(j.max()) + 1]

    out = dot_product_attention(q, k, v, attn_bias=function, backend="tiled", q_bucket_size=8, k_bucket_size=8)
    assert table.equal(before)
    torch.testing.assert_close(out, before.softmax(-1) @ v)


def test_query_heads_that_add_to_the_same_gradient_are_differentiated_in_one_thread(two_threads, monkeypatch):

    threads, differentiate = {}, onednn._differentiate

    def noted(shared, part, *rest):
        threads.setdefault((part.batch.start, part.kv_heads.start), set()).add(get_ident())
        sleep(0.05)  # else one thread might have done it all
        differentiate(shared, part, *rest)

    monkeypatch.setattr(onednn, "_differentiate", noted)
    q, k, v = (torch.randn(1, h, 128, 32, requires_grad=True) for h in (4, 2, 2))
    dot_product_attention(q, k, v, backend="onednn").sum().backward()
    assert [len(of_head) for of_head in threads.values()] == [1, 1]
    assert len(set().union(*threads.values())) == 2


def test_a_biass_gradient_is_summed_in_the_callers_thread(two_threads, monkeypatch):

    threads, add = set(), BiasGradient.add
    monkeypatch.setattr(BiasGradient, "add", lambda self, *rest: (threads.add(get_ident()), add(self, *rest))[1])
    q, k, v = (torch.randn(1, 4, 128, 32, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 128, 128, requires_grad=True)  # of all heads
    dot_product_attention(q, k, v, attn_bias=bias, backend="onednn").sum().backward()
    assert threads == {get_ident()}


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


@pytest.mark.parametrize("way", ["keyword", "list"])
def test_captured_tensors_wherever_an_operator_takes_them(way):
    learned = torch.tensor(0.7, requires_grad=True)
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))

    def function(score, b, h, i, j):
        if way == "keyword":
            return torch.mul(score, other=learned)
        return score * torch.stack([learned, learned.detach()])[0]

    ours = dot_product_attention(q, k, v, attn_bias=function, backend="tiled")
    truth = dot_product_attention(q * learned, k, v, backend="naive")
    (found,), (true,) = (torch.autograd.grad(out.square().sum(), learned) for out in (ours, truth))
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(found, true)


@pytest.mark.parametrize("kind", ["tensor", "module"])
@pytest.mark.parametrize("backend", ["products", "cpu_kernel", "onednn"])
def test_a_bias_that_no_query_sees_has_a_gradient_of_zeros(backend, kind):

    q, k, v = (torch.randn(1, 2, 20, 32) for _ in range(3))
    bias = RelativePositionBias(2) if kind == "module" else torch.randn(2, 20, 20, requires_grad=True)
    out = dot_product_attention(q, k, v, attn_bias=bias, mask=torch.zeros(1, 20, dtype=torch.bool), backend=backend)
    leaf = bias.weight if kind == "module" else bias
    assert torch.autograd.grad(out.sum(), leaf)[0].equal(torch.zeros_like(leaf))


def test_dropout_of_nothing_in_a_bias_module():

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.0)

        def forward(self, i, j):
            return self.drop((i[:, None] - j).float())

    dot_product_attention(*qkv(), attn_bias=Bias().train())
