"""Scores changed by a function, FlexAttention's ``score_mod``: its meaning, and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from memory_efficient_attention_pytorch import (
    Attention,
    KVCache,
    ReversibleSequence,
    dot_product_attention,
    select_backend,
)
from tests.reference import assert_as_accurate

B, H, KV, N, M, D = 2, 4, 2, 50, 61, 8
f64 = torch.float64


def causal(score, b, h, q, k):
    return torch.where(q >= k, score, -float("inf"))


def soft_cap(score, b, h, q, k, cap=3.0):
    return cap * torch.tanh(score / cap)


def alibi(score, b, h, q, k):
    return score + torch.exp2(-((h + 1) * 8.0 / H)) * (k - q)


def relative(score, b, h, q, k):
    return score + (q - k)


class RelativeTable(nn.Module):
    """A learned table of relative distances, soft-capped with a learned cap, as one module."""

    def __init__(self):
        super().__init__()
        self.table, self.cap = nn.Parameter(torch.randn(H, N + M)), nn.Parameter(torch.tensor(4.0))

    def forward(self, score, b, h, q, k):
        return self.cap * torch.tanh((score + self.table[h, q - k + M]) / self.cap)


def captured_table(kind: str, dtype: torch.dtype):
    """A learned table that a function captures in one of the ways there are, and the leaf of its gradient."""
    torch.manual_seed(5)
    leaf = torch.randn(H, N + M).to(dtype).requires_grad_()
    table = leaf.sin() if "computed" in kind else leaf

    def closure(score, b, h, q, k):
        return score * table[h, q - k + M].cos() + table[h, 0 * q]

    def given(table, score, b, h, q, k):
        return closure(score, b, h, q, k) if table is None else score + table[h, q - k + M]

    class Holder:
        __slots__ = ("tables",)

        def __init__(self):
            self.tables = {"of all": [table]}

        def __call__(self, score, b, h, q, k):
            return score + self.tables["of all"][0][h, q - k + M]

        def method(self, score, b, h, q, k):
            return self(score, b, h, q, k)

    made = {"closure": closure, "partial": partial(given, table), "object": Holder(), "method": Holder().method}
    return made[kind.split()[-1]], leaf


EXAMPLES = {"causal": causal, "soft cap": soft_cap, "alibi": alibi, "relative": relative}
CAPTURES = [f"{how}{kind}" for how in ("", "computed ") for kind in ("closure", "partial", "object", "method")]


def heads(dtype=torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((B, H, N, D), (B, KV, M, D), (B, KV, M, D))
    return [(2 * torch.randn(shape, dtype=f64)).to(dtype).requires_grad_() for shape in shapes]


def by_definition(q: Tensor, k: Tensor, v: Tensor, function, visible: Tensor | None = None) -> Tensor:
    """All scores at once, each changed as FlexAttention would have it, one place at a time."""
    scores = q @ k.repeat_interleave(H // KV, 1).mT * D**-0.5
    for axis in range(4)[::-1]:
        function = torch.vmap(function, in_dims=(0, *(0 if axis == other else None for other in range(4))))
    scores = function(scores, *(torch.arange(size) for size in (B, H, N, M)))
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(H // KV, 1)


def differentiated(out: Tensor, leaves) -> list[Tensor]:
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))]


def tiles(q: int = 16, k: int = 24) -> dict[str, int]:
    return {"q_bucket_size": q, "k_bucket_size": k}


@pytest.mark.parametrize("way", ["naive", "products", "auto"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_agree_with_the_definition(name, way):
    function, leaves, exact = EXAMPLES[name], heads(), heads(f64)
    ours = differentiated(dot_product_attention(*leaves, attn_bias=function, backend=way, **tiles()), leaves)
    naive = differentiated(by_definition(*leaves, function), leaves)
    truth = differentiated(by_definition(*exact, function), exact)
    for what, found, plain, true in zip(("out", "dq", "dk", "dv"), ours, naive, truth, strict=True):
        assert_as_accurate(what, found, plain, true, slack=4.0)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_examples_agree_with_flex_attention(name):
    q, k, v = (t.detach() for t in heads(f64))
    theirs = flex_attention(q, k, v, score_mod=EXAMPLES[name], enable_gqa=True)
    torch.testing.assert_close(
        dot_product_attention(q, k, v, attn_bias=EXAMPLES[name], backend="tiled", **tiles()), theirs
    )


@pytest.mark.parametrize("way", ["naive", "products"])
@pytest.mark.parametrize("kind", CAPTURES)
def test_captured_tensors_get_their_gradients(kind, way):
    leaves = heads(f64)
    function, leaf = captured_table(kind, f64)
    ours = differentiated(dot_product_attention(*leaves, attn_bias=function, backend=way, **tiles()), [*leaves, leaf])
    function, leaf = captured_table(kind, f64)
    truth = differentiated(by_definition(*leaves, function), [*leaves, leaf])
    for found, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(found, true)
    assert truth[-1].abs().max() > 0.1


def test_captured_tensors_accumulate_in_grad():
    function, leaf = captured_table("closure", torch.float32)
    for times in (1, 2, 3):
        dot_product_attention(*heads(), attn_bias=function, **tiles()).sum().backward()
        if times == 1:
            once = leaf.grad.clone()
        torch.testing.assert_close(leaf.grad, times * once)


def test_a_module_of_the_score_gets_its_gradients():
    torch.manual_seed(6)
    module, leaves = RelativeTable().to(f64), heads(f64)
    seen = []
    module.table.register_hook(seen.append)
    wanted = [*leaves, *module.parameters()]
    mask = torch.rand(B, 1, N, M) > 0.3
    given = {"attn_bias": module, "mask": mask, "causal": True, "backend": "tiled", **tiles()}
    ours = differentiated(dot_product_attention(*leaves, **given), wanted)
    assert len(seen) == 1, "a hook runs once, on the whole gradient"
    visible = mask & (torch.arange(M) <= torch.arange(N)[:, None] + M - N)
    truth = differentiated(by_definition(*leaves, module, visible), wanted)
    for found, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(found, true)


def test_dropout_and_windows_go_with_it():
    leaves = heads(f64)
    function, leaf = captured_table("closure", f64)
    found = []
    for way in ("naive", "products"):
        torch.manual_seed(7)
        given = {"attn_bias": function, "dropout": 0.3, "window": (20, 5), "backend": way, **tiles()}
        found.append(differentiated(dot_product_attention(*leaves, **given), [*leaves, leaf]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck():
    torch.manual_seed(8)
    shapes = ((1, 2, 3, 2), (1, 1, 5, 2), (1, 1, 5, 2), (2, 8))
    inputs = [torch.randn(shape, dtype=f64, requires_grad=True) for shape in shapes]

    def attend(q, k, v, table):
        def function(score, b, h, i, j):
            return 2 * torch.tanh((score + table[h, i - j + 4]) / 2)

        return dot_product_attention(
            q, k, v, attn_bias=function, causal=True, return_lse=True, backend="tiled", **tiles(2, 2)
        )

    assert torch.autograd.gradcheck(attend, inputs)


def test_scores_that_nobody_sees_send_nothing_back():
    """Where the function has no slope at a hidden score, as a root at 0, 0 times infinity is not a gradient."""
    q, k, v = (t.detach().abs() for t in heads())
    k[:, :, 40:] = 0
    leaves = [t.requires_grad_() for t in (q, k, v)]
    hidden = torch.arange(M) < 40
    out = dot_product_attention(
        *leaves, attn_bias=lambda s, b, h, q, k: s.sqrt(), mask=hidden.expand(B, M), backend="tiled", **tiles()
    )
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[1][:, :, 40:].any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("reversible", [True, False])
def test_layers_in_pieces_train_a_module_and_know_their_heads(groups, reversible):
    torch.manual_seed(9)
    layer = Attention(dim=16, heads=H, dim_head=4, head_chunks=groups, **tiles())
    bias, x = RelativeTable(), torch.randn(B, N, 16)
    blocks = ReversibleSequence([(layer, nn.Linear(16, 16))], {"attn_bias": [(True, False)]}, reversible=reversible)
    blocks(x, attn_bias=bias).square().sum().backward()
    found = [p.grad.clone() for p in bias.parameters()]
    bias.zero_grad()
    to_q, (to_k, to_v) = layer.to_q.weight, layer.to_kv.weight.chunk(2)
    q, k, v = ((x @ w.T).unflatten(-1, (H, -1)).transpose(1, 2) for w in (to_q, to_k, to_v))
    out = dot_product_attention(q, k, v, attn_bias=bias, backend="naive")
    y1 = x + layer.to_out(out.transpose(1, 2).flatten(2))
    y2 = x + blocks.blocks[0][1](y1) if hasattr(blocks, "blocks") else None
    assert y2 is not None
    (y1 + y2).square().sum().backward()
    for gradient, parameter in zip(found, bias.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_gradients_that_could_be_lost_are_refused():
    function, _ = captured_table("closure", torch.float32)
    x = torch.randn(B, N, 16, requires_grad=True)
    layer = Attention(dim=16, heads=H, dim_head=4, head_chunks=2)
    with pytest.raises(ValueError, match="attn_bias: expected a module that holds what needs a gradient as parameters"):
        layer(x, attn_bias=function)
    blocks = ReversibleSequence([(layer, nn.Identity())], {"attn_bias": [(True, False)]})
    with pytest.raises(ValueError, match="attn_bias: expected a module that holds what needs a gradient as parameters"):
        blocks(x, attn_bias=function)


def test_indices_from_0_are_refused_beside_a_cache():
    layer = Attention(dim=16, heads=H, dim_head=4, causal=True)
    for name, function in (("attn_bias", soft_cap), ("mask", lambda b, h, q, k: q >= k)):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=f"{name}: expected no function of indices together with a cache"),
        ):
            layer(torch.randn(B, 3, 16), cache=KVCache(), **{name: function})


class OfItsOwn(torch.autograd.Function):
    """Takes a tensor with a gradient where no operator is asked."""

    @staticmethod
    def forward(ctx, score, table):
        return score + table.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.sum()


def test_a_captured_tensor_that_no_leaf_can_stand_in_for_is_refused():
    table = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(
        ValueError, match="attn_bias: expected a function of which PyTorch's operators use the captured"
    ):
        dot_product_attention(*heads(), attn_bias=lambda score, b, h, q, k: OfItsOwn.apply(score, table))


def test_parameters_lent_to_a_closure_for_forward_alone_are_an_error():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = RelativeTable()

        def forward(self, q, k, v):
            by_closure = lambda score, b, h, i, j: self.bias(score, b, h, i, j)  # noqa: E731
            return dot_product_attention(q, k, v, attn_bias=by_closure, **tiles())

    layer = Layer()
    layer(*heads()).sum().backward()
    assert layer.bias.table.grad.abs().max() > 0
    lent = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    out = torch.func.functional_call(layer, lent, tuple(heads()))
    with pytest.raises(RuntimeError, match="attn_bias: in backward the function uses other tensors"):
        out.sum().backward()


@pytest.mark.parametrize("kept", [False, True])
def test_whatever_watches_a_captured_tensor_sees_one_gradient(kept):
    function, _ = captured_table("computed closure" if kept else "closure", torch.float32)
    seen = []
    table = function.__closure__[0].cell_contents
    table.register_hook(seen.append)
    if kept:
        table.retain_grad()
    dot_product_attention(*heads(), attn_bias=function, **tiles()).sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], table.grad)


def test_ways_that_cannot_say_why():
    q, k, v = heads()
    choice = select_backend(q, k, v, attn_bias=soft_cap)
    assert (choice.name, choice.way) == ("tiled", "products")
    assert "a function of the score needs the scores themselves" in choice.ruled_out["fused"]
    for way in ("cpu_kernel", "onednn", "fused"):
        with pytest.raises(NotImplementedError, match="a function of the score needs the scores"):
            dot_product_attention(q, k, v, attn_bias=soft_cap, backend=way)
    with pytest.raises(ValueError, match="attn_bias function's output: expected a floating-point tensor"):
        dot_product_attention(q, k, v, attn_bias=lambda s, b, h, q, k: q >= k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["naive", "products", "cpu_kernel", "onednn"])
def test_attention_sinks_by_the_log_sum_exp(way, dtype):
    """gpt-oss: a learned logit per head joins the softmax's denominator; out · sigmoid(lse − sink) is that."""
    torch.manual_seed(10)
    visible = torch.arange(M) <= torch.arange(N)[:, None] - 5  # some queries see nothing but the sink
    sink = torch.randn(H, dtype=f64).to(dtype).requires_grad_()
    leaves = [*heads(dtype), sink]

    def ours(q, k, v, sink):
        out, lse = dot_product_attention(q, k, v, mask=visible, return_lse=True, backend=way, **tiles())
        return (out * torch.sigmoid(lse - sink[:, None]).unsqueeze(-1)).to(v.dtype)

    def by_definition(q, k, v, sink):
        scores = q @ k.repeat_interleave(H // KV, 1).mT * D**-0.5
        scores = scores.masked_fill(~visible, -torch.inf)
        with_sink = torch.cat([scores, sink[:, None, None].expand(B, H, N, 1)], -1)
        return with_sink.softmax(-1)[..., :-1] @ v.repeat_interleave(H // KV, 1)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    triple = (differentiated(ours(*leaves), leaves), differentiated(by_definition(*leaves), leaves))
    truth = differentiated(by_definition(*exact), exact)
    for what, found, plain, true in zip(("out", "dq", "dk", "dv", "dsink"), *triple, truth, strict=True):
        assert_as_accurate(what, found, plain, true, slack=4.0)


def test_a_function_of_the_score_may_return_a_view_of_what_it_captures():
    table, (q, k, v) = torch.randn(1, 1, 20, 20), (torch.randn(1, 1, 20, 8) for _ in range(3))
    before = table.clone()

    def function(score, b, h, i, j):
        return table[..., int(i.min()) : int(i.max()) + 1, int(j.min()) : int(j.max()) + 1]

    out = dot_product_attention(q, k, v, attn_bias=function, backend="tiled", q_bucket_size=8, k_bucket_size=8)
    assert table.equal(before)
    torch.testing.assert_close(out, before.softmax(-1) @ v)


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
