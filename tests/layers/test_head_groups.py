"""Attention by groups of heads: the numbers of one group, the memory of one group, each recomputed once."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import (
    AlibiBias,
    Attention,
    CosineSimAttention,
    MaskFunction,
    PreNorm,
    RelativePositionBias,
    ReversibleSequence,
    RotaryEmbedding,
)
from memory_efficient_attention_pytorch.layers.head_groups import HeadGroup
from memory_efficient_attention_pytorch.recompute import normed
from tests import reference
from tests.agreement import assert_same, difference, gradients, products
from tests.memory.live_bytes import LiveBytes, saved_bytes

B, NQ, M, DIM, HEADS, WIDTH = 2, 11, 14, 12, 8, 4
DOUBLE = {"dtype": torch.float64}


def pair(groups, kind=Attention, **kwargs):
    """The same weights with one group of heads and with several, in fp64."""
    built = {"dim": DIM, "heads": HEADS, "dim_head": WIDTH, "q_bucket_size": 4, "k_bucket_size": 5, **kwargs}
    whole = kind(**built).double()
    grouped = kind(**built, head_chunks=groups).double()
    grouped.load_state_dict(whole.state_dict())
    return whole, grouped


def check(whole, grouped, x, extra=(), tolerance=1e-11, **kwargs):
    """Outputs, and gradients of x, of parameters (in the same order) and of `extra`."""
    truth, ours = whole(x, **kwargs), grouped(x, **kwargs)
    inputs = [t for t in (x, *extra) if t.requires_grad]
    wanted = [(*inputs, *(p for p in net.parameters() if p.requires_grad)) for net in (whole, grouped)]
    assert_same((ours, *gradients(ours, wanted[1])), (truth, *gradients(truth, wanted[0])), tolerance)


def tokens(n=NQ, dim=DIM, **kwargs):
    return torch.randn(B, n, dim, **DOUBLE, **kwargs)


@pytest.fixture(params=[None, 4], ids=["one slab", "small slabs"])
def _slab(request, monkeypatch):
    """Also with slabs that cut both a row of tokens and the batch."""
    if request.param:
        monkeypatch.setattr(normed, "SLAB_MINIMUM", request.param)


# The same numbers


@pytest.mark.usefixtures("_slab")
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("kwargs", [{}, {"causal": True}, {"window": 3}, {"window": (2, 0), "causal": True}], ids=str)
def test_groups_change_nothing(groups, kwargs):
    check(*pair(groups, **kwargs), tokens(requires_grad=True), mask=torch.rand(B, NQ) > 0.2)


@pytest.mark.usefixtures("_slab")
@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 2), (1, 8), (2, 2), (2, 4), (4, 8), (4, 2)])
def test_shared_key_heads(kv_heads, groups):
    """A group holds whole sets of heads that share a key head, or is a part of one: its gradients add up."""
    check(*pair(groups, kv_heads=kv_heads, causal=True), tokens(requires_grad=True))


@pytest.mark.usefixtures("_slab")
@pytest.mark.parametrize("of_context", [True, False])
def test_cross_attention(of_context):
    x, context = tokens(requires_grad=True), tokens(M, requires_grad=of_context)
    check(*pair(4), x, [context], context=context, mask=torch.rand(B, M) > 0.2)
    check(*pair(4), x.detach(), [context], context=context)


@pytest.mark.parametrize("shape", [(HEADS, NQ, M), (B, 1, 1, M), (1, HEADS, 1, M), (NQ, M), (B, HEADS, NQ, M)], ids=str)
def test_masks_and_biases_of_any_shape(shape):
    """A mask or bias with a dimension of heads is cut for the group; the bias's gradient arrives whole."""
    x, context, bias = tokens(requires_grad=True), tokens(M), torch.randn(shape, **DOUBLE, requires_grad=True)
    check(*pair(4), x, [bias], context=context, attn_bias=bias, mask=torch.rand(shape) > 0.2)


class PerHead(nn.Module):
    """A learned slope per head, from outside of the library: it knows nothing of groups."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(HEADS))

    def forward(self, i, j):
        return -self.slopes[:, None, None] * (i[:, None] - j[None, :]).abs()


class PerSequence(PerHead):
    """Also another for each sequence."""

    def forward(self, i, j):
        return torch.arange(1, 1 + B)[:, None, None, None] * super().forward(i, j)


@pytest.mark.parametrize("make", [lambda: RelativePositionBias(HEADS), PerHead, PerSequence, lambda: AlibiBias(HEADS)])
def test_bias_modules(make):
    bias = make().double()
    check(*pair(4), tokens(requires_grad=True), [*bias.parameters()], attn_bias=bias)


@pytest.mark.parametrize("positions", [torch.arange(NQ), torch.arange(B * NQ).view(B, NQ)], ids=["shared", "per row"])
def test_rotary_positions(positions):
    table = RotaryEmbedding(WIDTH).double()(positions)
    check(*pair(4, kv_heads=2), tokens(requires_grad=True), rotary=table, tolerance=1e-6)


def test_documents():
    ids = torch.tensor([[0] * 4 + [1] * 7, [3] * 9 + [4] * 2])
    check(*pair(4, causal=True), tokens(requires_grad=True), document_ids=ids)


def test_cosine_attention_with_its_learned_scale():
    whole, grouped = pair(4, CosineSimAttention, seq_len=NQ)
    check(whole, grouped, tokens(requires_grad=True))
    assert grouped.scale.shape == (1, HEADS, 1, 1)


@pytest.mark.parametrize("shape", [(0, NQ, DIM), (B, 0, DIM), (B, 1, DIM)], ids=str)
def test_few_or_no_tokens(shape):
    check(*pair(4), torch.randn(shape, **DOUBLE, requires_grad=True))


def test_a_hook_on_a_weight_or_bias_runs_once_on_the_whole_gradient():
    whole, grouped = pair(4)
    x, bias = tokens(), RelativePositionBias(HEADS).double()
    bias.weight.data.normal_()
    (truth, of_bias) = gradients(whole(x, attn_bias=bias), [whole.to_q.weight, bias.weight])
    seen = []
    for parameter in (grouped.to_q.weight, bias.weight):
        parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
    gradients(grouped(x, attn_bias=bias), [grouped.to_q.weight, bias.weight])
    assert_same(sorted(seen, key=lambda t: -t.numel()), sorted([truth, of_bias], key=lambda t: -t.numel()), 1e-11)


# Precision and randomness


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_accurate_as_one_group(autocast):
    whole = Attention(dim=32, heads=8, dim_head=8, causal=True)
    exact, x = copy.deepcopy(whole).double(), torch.randn(2, 64, 32).bfloat16()
    if not autocast:
        whole = whole.bfloat16()
    grouped = Attention(dim=32, heads=8, dim_head=8, causal=True, head_chunks=8).to(whole.to_q.weight.dtype)
    grouped.load_state_dict(whole.state_dict())

    def run(net, dtype):
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and net is not exact):
            out = net(leaf)
        return out, *gradients(out, (leaf, *net.parameters()))

    truth = run(exact, torch.float64)
    dtype = torch.float32 if autocast else torch.bfloat16
    for i, (ours, naive, true) in enumerate(zip(run(grouped, dtype), run(whole, dtype), truth, strict=True)):
        assert ours.dtype == naive.dtype
        reference.assert_as_accurate(f"tensor {i}", ours.bfloat16(), naive.bfloat16(), true)


def test_dropout_differs_between_groups():
    """Two groups of equal weights with a mask of their own each."""
    _, net = pair(8, dropout=0.5)
    with torch.no_grad():
        for weight in (net.to_q.weight, net.to_kv.weight):
            weight.copy_(weight.unflatten(0, (-1, WIDTH))[:1].expand(weight.shape[0] // WIDTH, -1, -1).flatten(0, 1))
        net.to_out.weight.copy_(torch.eye(DIM, HEADS * WIDTH))
    out = net(tokens())
    first, second = out[..., :WIDTH], out[..., WIDTH : 2 * WIDTH]
    assert difference(first, second) > 0.1


# Within a block


@pytest.mark.usefixtures("_slab")
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("what", ["plain", "context", "bias", "frozen norm"])
def test_a_reversible_block_of_groups(groups, what):
    """The norm belongs to the pieces, is differentiated in them, and leaves a context alone."""
    whole, grouped = (PreNorm(DIM, net).double() for net in pair(groups, kv_heads=4, causal=what == "plain"))
    with torch.no_grad():
        whole.norm.weight.normal_(), whole.norm.bias.normal_()
    grouped.load_state_dict(whole.state_dict())
    if what == "frozen norm":
        whole.norm.requires_grad_(False), grouped.norm.requires_grad_(False)
    extra = {
        "context": {"context": tokens(M, requires_grad=True)},
        "bias": {"attn_bias": torch.randn(HEADS, NQ, NQ, **DOUBLE, requires_grad=True)},
    }.get(what, {})
    x, route = tokens(requires_grad=True), {name: [(True, False)] for name in extra}

    def run(net, **kwargs):
        out = ReversibleSequence([(net, nn.Identity())], route, **kwargs)(x, **extra)
        return out, *gradients(out, (x, *extra.values(), *(p for p in net.parameters() if p.requires_grad)))

    assert_same(run(grouped), run(whole, reversible=False), 1e-10)


# Refusals


@pytest.mark.parametrize(("heads", "kv_heads", "groups"), [(8, 8, 3), (8, 2, 16), (6, 2, 3), (12, 4, 3)])
def test_groups_that_do_not_fit_are_refused(heads, kv_heads, groups):
    """12 heads in threes share 4 key heads: groups of 4 would cut a set of three in the middle."""
    with pytest.raises(ValueError, match=f"head_chunks: expected a number that splits {heads} heads evenly"):
        Attention(dim=DIM, heads=heads, kv_heads=kv_heads, head_chunks=groups)


def test_groups_cover_every_head_once_and_read_the_key_heads_that_serve_them():
    for heads, kv_heads, groups in [(8, 8, 4), (8, 2, 2), (8, 2, 4), (8, 1, 8), (12, 4, 12), (12, 4, 2), (6, 3, 1)]:
        split = HeadGroup.split(heads, kv_heads, groups)
        assert len(split) == groups
        assert [h for group in split for h in range(heads)[group.heads]] == list(range(heads))
        for group in split:
            served = sorted({h * kv_heads // heads for h in range(heads)[group.heads]})
            assert list(range(kv_heads)[group.kv_heads]) == served


@pytest.mark.parametrize("change", ["another class", "forward", "forward hook", "pre-hook", "backward hook", "bias"])
def test_a_projection_that_is_more_than_a_matrix_runs_itself_for_all_heads_at_once(change):
    _, net = pair(4)
    if change == "another class":
        net.to_q = nn.Sequential(net.to_q, nn.Tanh())
        net.to_q.in_features = DIM
    elif change == "bias":
        net.to_out = nn.Linear(HEADS * WIDTH, DIM).double()
    elif change == "forward":
        net.to_out.forward = lambda values, plain=net.to_out.forward: plain(values).tanh()
    elif change == "forward hook":
        net.to_kv.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "pre-hook":
        net.to_kv.register_forward_pre_hook(lambda module, args: None)
    else:
        net.to_kv.register_full_backward_hook(lambda module, of_in, of_out: None)
    x = tokens(requires_grad=True)
    for ours in (net, ReversibleSequence([(nn.Identity(), PreNorm(DIM, net).double())])):
        wanted, found = (x, *ours.parameters()), []
        for groups in (4, 1):
            net.head_groups = HeadGroup.split(HEADS, net.kv_heads, groups)
            with contextlib.nullcontext() if groups == 1 else pytest.warns(match="head_chunks: Attention .* a whole"):
                out = ours(x)
                found.append((out, *gradients(out, wanted)))
        assert_same(*found, 1e-12)


@pytest.mark.parametrize("where", ["attention", "block"])
def test_hooks_on_the_modules_above_the_pieces_run(where):
    whole, grouped = (PreNorm(DIM, net).double() for net in pair(4))
    grouped.load_state_dict(whole.state_dict())
    seen = []
    hooked = grouped.fn if where == "attention" else grouped
    hooked.register_forward_hook(lambda module, args, out: (seen.append(where), 2 * out)[1])
    x = tokens(requires_grad=True)
    ours = ReversibleSequence([(grouped, nn.Identity())])(x)
    y = x + 2 * whole(x)
    truth = y + x + y
    assert_same(
        (ours, *gradients(ours, (x, *grouped.parameters()))),
        (truth, *gradients(truth, (x, *whole.parameters()))),
        1e-10,
    )
    assert seen


# Memory and work

BIG, LONG = 64, 4096
UNIT = LONG * BIG * 4  # bytes of one (1, n, dim) tensor
SLAB = normed.SLAB_MINIMUM / LONG
OF_PARAMETERS = 4 * BIG * BIG * 4


def step(net, x):
    with LiveBytes() as count:
        count.ignore(net.parameters())
        net(x).backward(torch.ones(1, 1, 1).expand(x.shape))
    return count


def big(groups, **kwargs):
    return Attention(dim=BIG, heads=8, dim_head=BIG // 8, head_chunks=groups, causal=True, **kwargs)


def test_forward_keeps_the_input_and_nothing_else():
    x = torch.randn(1, LONG, BIG, requires_grad=True)
    for groups in (2, 8):
        net = big(groups)
        assert saved_bytes(net, x) == x.nbytes + sum(p.nbytes for p in net.parameters())


def test_memory_of_one_group():
    """q, k, v, the output and a gradient of each, over the number of groups; besides output and gradient of x."""
    x = torch.randn(1, LONG, BIG, requires_grad=True)
    for groups in (2, 4, 8):
        peak = (step(big(groups), x).peak - OF_PARAMETERS) / UNIT
        assert peak <= 2 + 8 / groups + SLAB * (1 + 3 / groups) + 0.1, f"{groups} groups: {peak:.2f}"


def test_memory_in_a_reversible_block():
    """The same 8 tensors of a group; besides two streams, their gradients and the output."""
    x = torch.randn(1, LONG, BIG, requires_grad=True)
    for groups in (1, 2, 4, 8):
        net = ReversibleSequence([(PreNorm(BIG, big(groups)), nn.Identity())])
        peak = (step(net, x).peak - OF_PARAMETERS) / UNIT
        assert peak <= 5 + (8 if groups > 1 else 10) / groups + 2.5 * SLAB + 0.1, f"{groups} groups: {peak:.2f}"


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("place", [None, 0, 1, 2, 3])
def test_every_group_is_recomputed_once(groups, place):
    """Per group: a product in and one out; again in; gradients: out 2, in 3 and 1.

    Out again, to be subtracted, only within a chain: its first step's input nobody needs, its last one's is kept.
    """
    net, x = big(groups), torch.randn(1, 256, BIG, requires_grad=True)
    steps = [net if place == number else nn.Identity() for number in range(4)]
    count = step(net if place is None else ReversibleSequence([steps[:2], steps[2:]]), x)
    assert products(count) == groups * (2 + (2 if place in (1, 2) else 1) + 6)
    assert count.fused == groups * 3, "the attention kernel: forward, once more, backward"


@pytest.mark.parametrize("groups", [2, 4])
def test_frozen_groups_cost_no_product_for_their_weights(groups):
    frozen, x = big(groups).requires_grad_(False), torch.randn(1, 256, BIG, requires_grad=True)
    assert products(step(frozen, x)) == groups * (2 + 1 + 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_context_whose_gradient_nobody_wants_costs_no_product(groups):
    """A frozen encoder's, in every layer."""
    net, x, context = big(groups), torch.randn(1, 256, BIG, requires_grad=True), torch.randn(1, 256, BIG)

    def of(context):
        chain = ReversibleSequence([(nn.Identity(), net)], args_route={"context": [(False, True)]})
        with LiveBytes() as count:
            chain(x, context=context).sum().backward()
        return products(count)

    assert of(context) == of(context.clone().requires_grad_()) - groups


def test_head_groups_of_a_mask_function_of_some_heads():
    def function(b, h, i, j):
        return i - j <= 3 * h

    net, x = Attention(dim=16, heads=2, dim_head=8, head_chunks=2), torch.randn(1, 20, 16)
    heads, at = torch.arange(2, 4)[:, None, None], torch.arange(20)
    truth = net(x, mask=(at[:, None] - at <= 3 * heads)[None])
    torch.testing.assert_close(net(x, mask=MaskFunction(function, first_head=2)), truth)


def test_sums_over_many_groups_lose_no_more_than_one_product():
    exact, x = Attention(dim=32, heads=64, dim_head=4).double(), torch.randn(4, 64, 32).bfloat16()
    errors = []
    for groups in (1, 64):
        net = Attention(dim=32, heads=64, dim_head=4, head_chunks=groups).bfloat16()
        net.load_state_dict(exact.state_dict())
        same = copy.deepcopy(net)
        truth = Attention(dim=32, heads=64, dim_head=4).double()
        truth.load_state_dict(same.state_dict())
        errors.append((net(x).double() - truth(x.double())).square().mean().sqrt())
    assert errors[1] <= 1.5 * errors[0]
