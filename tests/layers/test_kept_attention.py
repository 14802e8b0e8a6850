"""keep_attention: backward takes attention's output and log-sum-exp from the forward pass, and changes nothing else."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch import (
    AlibiBias,
    Attention,
    CosineSimAttention,
    FeedForward,
    PreNorm,
    RelativePositionBias,
    ReversibleSequence,
    Transformer,
)
from memory_efficient_attention_pytorch.attention.decision import OneDnn, Products
from tests.agreement import assert_same, gradients, with_seed
from tests.memory.live_bytes import LiveBytes

B, N, DIM, HEADS, WIDTH = 2, 21, 16, 4, 4
FORWARD, BACKWARD = (f"_scaled_dot_product_flash_attention_for_cpu{name}" for name in ("", "_backward"))


def block(keep, exact=True, reversible=True, kind=Attention, **kwargs):
    """Two blocks on x, the same weights each time."""
    torch.manual_seed(0)
    built = {"dim": DIM, "heads": HEADS, "dim_head": WIDTH, "q_bucket_size": 8, "k_bucket_size": 6, **kwargs}
    pairs = [(PreNorm(DIM, kind(**built, keep_attention=keep)), FeedForward(DIM, 2)) for _ in range(2)]
    routes = {name: [(True, False)] * 2 for name in ("mask", "attn_bias", "document_ids", "context")}
    return ReversibleSequence(pairs, routes, exact=exact, reversible=reversible)


def run(net, x, extra=(), autocast=False, **kwargs):
    """Output and gradients of x, of `extra` and of the parameters; and what backward called."""
    wanted = [t for t in (x, *extra, *net.parameters()) if t.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = with_seed(lambda: net(x, **kwargs))
    with LiveBytes() as count:
        found = gradients(out, wanted)
    return (out, *found), count.calls


def tokens(requires_grad=True, **kwargs):
    return torch.randn(B, N, DIM, requires_grad=requires_grad, generator=torch.Generator().manual_seed(1), **kwargs)


SETTINGS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 5},
    "tiled": {"causal": True, "backend": "tiled"},
    "shared keys": {"kv_heads": 2, "causal": True},
    "one key head": {"kv_heads": 1},
    "dropout": {"dropout": 0.3},
    "cosine": {"kind": CosineSimAttention, "seq_len": N},
}
PADDING = torch.arange(N)[None] >= torch.tensor([[0], [7]])
CALLS = {
    "nothing": lambda: {},
    "padding": lambda: {"mask": PADDING},
    "nothing to see": lambda: {"mask": torch.zeros(B, N, dtype=torch.bool)},
    "a whole mask": lambda: {"mask": torch.rand(B, HEADS, N, N, generator=torch.Generator().manual_seed(2)) > 0.5},
    "documents": lambda: {"document_ids": (torch.arange(N) // 5).expand(B, N)},
    "bias module": lambda: {"attn_bias": RelativePositionBias(HEADS)},
    "slopes": lambda: {"attn_bias": AlibiBias(HEADS)},
    "bias": lambda: {"attn_bias": torch.randn(HEADS, N, N).requires_grad_()},
    "context": lambda: {"context": torch.randn(B, N, DIM).requires_grad_()},
}


PAIRS = [(call, "causal") for call in CALLS] + [(call, name) for call in ("nothing", "padding") for name in SETTINGS]


@pytest.mark.parametrize(("groups", "autocast"), [(1, False), (2, True), (4, False)])
@pytest.mark.parametrize(("call", "settings"), sorted({*PAIRS, ("bias", "plain")}), ids=lambda name: name)
def test_bit_for_bit_what_computing_it_again_gives(call, settings, groups, autocast):
    kwargs = CALLS[call]()
    extra = [t for v in kwargs.values() for t in (v.parameters() if isinstance(v, nn.Module) else [v])]
    built = {**SETTINGS[settings], "head_chunks": groups}
    (ours, calls), (truth, again) = (
        run(block(keep, **built), tokens(), extra, autocast, **kwargs) for keep in (True, False)
    )
    assert_same(ours, truth, 0.0)
    assert not calls[FORWARD]
    assert calls[BACKWARD] == again[BACKWARD]


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_by_kernel_or_by_products_is_not_computed_again(groups):
    """In backward: an attention's forward kernel; a tile's two products of its forward, where products do it."""
    counts = {}
    for keep in (False, True, "cpu"):
        for dropout in (0.0, 0.1):
            net = block(keep, causal=True, head_chunks=groups, dropout=dropout)
            counts[keep, dropout] = run(net, tokens())[1]
    assert counts[False, 0.0][FORWARD] == counts[False, 0.0][BACKWARD] == 2 * groups
    for keep in (True, "cpu"):
        assert counts[keep, 0.0][FORWARD] == 0
        assert counts[keep, 0.0][BACKWARD] == 2 * groups
        # Forward takes 2 products per tile, backward 5 of which it makes the scores again.
        assert 5 * (counts[False, 0.1]["bmm"] - counts[keep, 0.1]["bmm"]) == 2 * counts[keep, 0.1]["bmm"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("reversible", [True, False])
def test_rounded_streams_and_stored_activations(groups, reversible):
    """Not on a grid, rebuilt streams differ in their last bits: the kept output is the one the forward pass used."""
    x = tokens().double().detach().requires_grad_()
    built = {"causal": True, "head_chunks": groups, "exact": False}
    truth, _ = run(block(False, **built, backend="naive", reversible=False).double(), x)
    ours, calls = run(block(True, **built, reversible=reversible).double(), x)
    assert_same(ours, truth, 1e-12)
    assert not calls[FORWARD]


def test_groups_outside_of_a_block():
    net = Attention(dim=DIM, heads=HEADS, dim_head=WIDTH, head_chunks=2, causal=True, keep_attention=True)
    (ours, calls) = run(net, tokens())
    net.keep_attention = False
    (truth, again) = run(net, tokens())
    assert_same(ours, truth, 0.0)
    assert (calls[FORWARD], again[FORWARD]) == (0, 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("where", ["attention", "branch"])
def test_with_hooks_and_in_modules_from_outside(groups, where):
    """Modules that are run as a whole: attention within is found all the same, in the order of its calls."""

    class Twice(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(torch.tanh(self.attention(x)))

    def net(keep):
        torch.manual_seed(0)
        attention = Attention(dim=DIM, heads=HEADS, dim_head=WIDTH, head_chunks=groups, keep_attention=keep)
        if where == "attention":
            attention.register_forward_hook(lambda module, args, out: 2 * out)
        return ReversibleSequence([(Twice(attention), nn.Identity())], exact=True)

    (ours, calls), (truth, again) = (run(net(keep), tokens()) for keep in (True, False))
    assert_same(ours, truth, 0.0)
    assert not calls[FORWARD]
    assert again[FORWARD] >= 2 * groups


def test_several_backwards_and_forwards():
    """Of the same graph, and of two graphs at once: each has what its own forward pass found."""
    net, x, other = block(True, causal=True, head_chunks=2), tokens(), tokens().detach().mul(3).requires_grad_()
    first, second = net(x), net(other)
    wanted = (x, *net.parameters())
    once, twice = gradients(first, wanted, retain_graph=True), gradients(first, wanted, retain_graph=True)
    of_other = gradients(second, (other, *net.parameters()))
    with LiveBytes() as count:
        assert_same(gradients(first, wanted), once, 0.0)
    assert not count.calls[FORWARD]
    assert_same(twice, once, 0.0)
    again = block(False, causal=True, head_chunks=2)
    assert_same(once, gradients(again(x), (x, *again.parameters())), 0.0)
    assert_same(of_other, gradients(again(other), (other, *again.parameters())), 0.0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_a_checkpoint(reentrant):
    """Nothing is kept in the forward pass; what the checkpoint repeats is then not repeated once more."""
    net, x = block(True, causal=True, head_chunks=2), tokens()
    with LiveBytes() as count:
        out = checkpoint(net, x, use_reentrant=reentrant)
    kept = count.live - out.nbytes
    assert kept <= x.nbytes
    with LiveBytes() as count:
        found = gradients(out, (x, *net.parameters())) if not reentrant else None
        if reentrant:
            out.backward(torch.ones_like(out))
    assert count.calls[FORWARD] == 4
    if found is not None:
        assert_same(found, gradients(net(x), (x, *net.parameters())), 0.0)


def test_nothing_is_kept_without_a_backward():
    net, x = block(True, causal=True, head_chunks=2), tokens(requires_grad=False)
    with torch.no_grad(), LiveBytes() as count:
        out = net(x)
    assert count.live == out.nbytes
    assert_same([out], [block(False, causal=True, head_chunks=2)(x).detach()], 0.0)


def test_a_checkpoint_within_a_block_is_refused_not_given_another_calls_output():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(dim=DIM, heads=HEADS, dim_head=WIDTH, keep_attention=True)

        def forward(self, x):
            return checkpoint(self.attention, x, use_reentrant=False)

    out = ReversibleSequence([(Checkpointed(), nn.Identity())])(tokens())
    with pytest.raises(ValueError, match="keep_attention: expected Attention to be called in backward as in forward"):
        out.sum().backward()


def test_of_the_whole_model():
    """A learned position, a loss in chunks, tied embeddings: keep_attention reaches every layer."""
    found = []
    for keep in (False, True, "cpu"):
        torch.manual_seed(0)
        shape = {"num_tokens": 30, "max_seq_len": N, "dim": DIM, "depth": 3, "heads": HEADS, "dim_head": WIDTH}
        model = Transformer(
            **shape, causal=True, head_chunks=2, ff_chunks=3, exact=True, tie_embeddings=True, keep_attention=keep
        )
        x = torch.randint(30, (B, N))
        loss = model(x, labels=x)
        with LiveBytes() as count:
            loss.backward()
        assert count.calls[FORWARD] == (0 if keep else 6)
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert_same(found[1], found[0], 0.0)
    assert_same(found[2], found[0], 0.0)


@pytest.mark.parametrize("value", ["host", "cuda", 1, None, 0.0])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="keep_attention: expected False, True or 'cpu', got "):
        Attention(dim=DIM, keep_attention=value)


def test_the_definition_keeps_every_score_anyhow():
    with pytest.raises(ValueError, match="keep_attention: expected False with backend 'naive'"):
        Transformer(num_tokens=9, max_seq_len=9, dim=DIM, depth=1, backend="naive", keep_attention=True)


def test_kept_attention_goes_the_way_of_forward_whatever_changed_between(monkeypatch):
    ways = []
    for kind in (OneDnn, Products):
        backward = kind.backward
        monkeypatch.setattr(
            kind, "backward", lambda self, *a, backward=backward: (ways.append(self.name), backward(self, *a))[1]
        )
    net = Attention(dim=64, heads=2, dim_head=32, head_chunks=1, dropout=0.1, keep_attention=True)
    out = ReversibleSequence([(net, nn.Identity())])(torch.randn(1, 2048, 64, requires_grad=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    out.sum().backward()
    assert ways == ["onednn"]
