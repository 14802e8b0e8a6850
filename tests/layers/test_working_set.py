"""How many pieces are chosen where nobody says, that it is decided once, and that results are those of the whole."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Attention, FeedForward, PreNorm, ReversibleSequence, Transformer, plan
from memory_efficient_attention_pytorch.layers import working_set
from memory_efficient_attention_pytorch.layers.working_set import feed_forward_chunks, head_chunks
from tests.agreement import assert_same, gradients
from tests.memory.live_bytes import saved_bytes


@pytest.fixture
def small_sets(monkeypatch):
    """What is cut at some MiB, cut at some KiB."""
    monkeypatch.setattr(working_set, "WHOLE", 8 << 10)
    monkeypatch.setattr(working_set, "PIECE", {"cpu": 4 << 10})
    monkeypatch.setattr(working_set, "LEAST_TOKENS", {"cpu": 2})


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch", "tokens", "hidden", "itemsize", "device", "expected"),
    [
        (8, 256, 2048, 4, "cpu", 1),
        (1, 8192, 2048, 4, "cpu", 8),
        (1, 8192, 2048, 2, "cpu", 4),
        (1, 8192, 8192, 4, "cpu", 32),
        (1, 8192, 32768, 4, "cpu", 32),
        (64, 4, 1 << 20, 4, "cpu", 1),
        (1024, 4, 1 << 20, 4, "cpu", 4),
        (1, 8192, 2048, 4, "cuda", 4),
        (1, 65536, 16384, 4, "cuda", 64),
        (0, 8192, 2048, 4, "cpu", 1),
        (4, 0, 2048, 4, "cpu", 1),
    ],
)
def test_chunks_of_tokens(batch, tokens, hidden, itemsize, device, expected):
    assert feed_forward_chunks(batch, tokens, hidden, itemsize, device) == expected


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "kv_heads", "device", "threads", "expected"),
    [
        (8, 256, 8, 8, "cpu", 2, 1),
        (1, 8192, 8, 8, "cpu", 2, 4),
        (1, 8192, 8, 8, "cpu", 1, 8),
        (1, 8192, 8, 8, "cpu", 16, 1),
        (2, 8192, 8, 8, "cpu", 2, 8),
        (1, 8192, 16, 16, "cpu", 2, 8),
        (1, 8192, 12, 4, "cpu", 2, 4),
        (1, 8192, 8, 1, "cpu", 2, 4),
        (1, 8192, 6, 2, "cpu", 1, 6),
        (1, 8192, 8, 8, "cuda", 64, 4),
        (0, 8192, 8, 8, "cpu", 2, 1),
    ],
)
def test_groups_of_heads(batch, tokens, heads, kv_heads, device, threads, expected):
    assert head_chunks(batch, (tokens, tokens), (heads, kv_heads), 64, 4, device, threads) == expected


@pytest.mark.parametrize(("heads", "kv_heads", "expected"), [(8, 8, 4), (8, 1, 1), (8, 2, 2), (6, 2, 2)])
def test_heads_that_share_keys_stay_together_where_these_are_sent(heads, kv_heads, expected):
    assert head_chunks(1, (8192, 8192), (heads, kv_heads), 64, 4, "cpu", threads=2, divided=True) == expected


def test_keys_of_a_context_count():
    assert head_chunks(1, (16, 8192), (8, 8), 64, 4) == 8
    assert head_chunks(1, (16, 16), (8, 8), 64, 4) == 1


@pytest.mark.usefixtures("small_sets")
@pytest.mark.parametrize("layer", [Attention(dim=16, heads=4, dim_head=4), FeedForward(16)], ids=["heads", "tokens"])
def test_pieces_that_nobody_asked_for_change_no_result(layer, threads):
    threads(1)
    layer = layer.double()
    whole = (
        Attention(dim=16, heads=4, dim_head=4, head_chunks=1) if isinstance(layer, Attention) else FeedForward(16, 4, 1)
    )
    whole.double().load_state_dict(layer.state_dict())
    x = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(layer, x) < saved_bytes(whole, x) / 2
    for wrap in (lambda net: net, lambda net: ReversibleSequence([(nn.Identity(), PreNorm(16, net).double())])):
        found = []
        for net in map(wrap, (layer, whole)):
            out = net(x)
            found.append((out, *gradients(out, (x, *net.parameters()))))
        assert_same(*found, 1e-12)
    short = x[:, :2]
    assert torch.equal(layer(short), whole(short)), "one piece is the plain module"


@pytest.mark.usefixtures("small_sets")
@pytest.mark.parametrize("reversible", [True, False])
def test_backward_takes_the_pieces_of_forward(reversible, threads):
    """Although the number of threads has changed since, and dropout draws for each group."""
    torch.manual_seed(0)
    layers = [(PreNorm(16, Attention(dim=16, heads=4, dim_head=4, dropout=0.3)), PreNorm(16, FeedForward(16)))]
    net = ReversibleSequence(layers, reversible=reversible).double()
    x, found = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True), []
    for later in (1, 8):
        threads(1)
        torch.manual_seed(1)
        out = net(x)
        threads(later)
        found.append((out, *gradients(out, (x, *net.parameters()))))
    assert_same(*found, 1e-12)


@pytest.mark.usefixtures("small_sets")
def test_inputs_of_any_rank_and_none():
    net = FeedForward(16)
    for shape in ((16,), (40, 16), (2, 40, 16), (2, 40, 3, 16), (0, 40, 16), (2, 0, 16)):
        x = torch.randn(shape, requires_grad=True)
        assert_same([net(x)], [net.net(x)], 1e-6)
        net(x).sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("shape", [(16,), (40, 16), (1, 2, 40, 16), (2, 40, 8)], ids=str)
def test_inputs_that_attention_refuses_are_named(shape):
    net = Attention(dim=16, heads=4, dim_head=4)
    for ours in (net, ReversibleSequence([(net, nn.Identity())])):
        with pytest.raises(ValueError, match="x: expected shape"):
            ours(torch.randn(shape))
    with pytest.raises(ValueError, match="context: expected shape"):
        net(torch.randn(2, 40, 16), torch.randn(shape))


@pytest.mark.usefixtures("small_sets")
def test_transforms_and_compilers_see_the_whole():
    net, x = FeedForward(16).double(), torch.randn(2, 40, 16, dtype=torch.float64)
    whole = torch.func.grad(lambda x: net.net(x).square().sum())(x)
    assert_same([torch.func.grad(lambda x: net(x).square().sum())(x)], [whole], 1e-12)
    assert_same([torch.func.vmap(net)(x[:, None])[:, 0]], [net.net(x)], 1e-12)
    with torch.no_grad():
        exported = torch.export.export(
            net, (x,), dynamic_shapes=({1: torch.export.Dim("n", min=2, max=4096)},)
        ).module()
        assert_same([exported(x)], [net.net(x)], 1e-12)
        assert_same([exported(x[:, :7])], [net.net(x[:, :7])], 1e-12)


def test_what_is_stored_is_not_cut_unless_asked():
    shape = {"num_tokens": 8, "max_seq_len": 8, "dim": 8, "depth": 1, "heads": 2, "dim_head": 4}
    for kwargs, groups, chunks in (
        ({}, None, None),
        ({"reversible": False}, 1, 1),
        ({"reversible": False, "head_chunks": 2, "ff_chunks": 4}, 2, 4),
        ({"head_chunks": 1, "ff_chunks": 1}, 1, 1),
    ):
        attention, feed = (branch.fn for branch in Transformer(**shape, **kwargs).layers[0])
        assert (attention.head_groups and len(attention.head_groups), feed.chunks) == (groups, chunks)


@pytest.mark.parametrize(
    ("device", "threads", "expected"), [("cpu", 2, (4, 8)), ("cpu", 8, (1, 8)), ("cuda", 8, (4, 4))]
)
def test_the_planner_tells_and_plans_what_will_be_chosen(device, threads, expected):
    config = {"num_tokens": 256, "dim": 512, "depth": 2, "heads": 8, "causal": True}
    options = {"batch_size": 1, "seq_len": 8192, "device": device, "threads": threads}
    made = plan(config, **options)
    assert (made.settings.get("head_chunks", 1), made.settings["ff_chunks"]) == expected
    told = plan({**config, "head_chunks": expected[0], "ff_chunks": expected[1]}, **options)
    assert told.settings == {}
    assert made.peak_bytes == told.peak_bytes < plan({**config, "head_chunks": 1, "ff_chunks": 1}, **options).peak_bytes
