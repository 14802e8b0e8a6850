"""The whole network in every configuration: stored or rebuilt, in pieces or whole, the loss is that of the logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memory_efficient_attention_pytorch import AutoregressiveWrapper, KVCache, ReversibleSequence, Transformer
from tests import reference
from tests.agreement import assert_same, difference, gradients, with_seed
from tests.memory.live_bytes import LiveBytes

SHAPE = {"num_tokens": 29, "max_seq_len": 24, "dim": 16, "depth": 3, "heads": 4, "dim_head": 4, "causal": True}
CONFIGURATIONS = [
    {},
    {"causal": False},
    {"positions": "rotary", "kv_heads": 2, "head_chunks": 2},
    {"positions": "alibi", "head_chunks": 4, "ff_chunks": 3},
    {"positions": "none", "window": 5, "tie_embeddings": True},
    {"window": (6, 2), "causal": False, "head_chunks": 2},
    {"exact": True, "ff_chunks": 4, "kv_heads": 1},
    {"tie_embeddings": True, "loss_chunk_size": 5, "use_flash_attn": False},
    {"dropout": 0.3, "head_chunks": 2, "q_bucket_size": 7, "k_bucket_size": 5},
    {"ff_mult": 1, "loss_chunk_size": 1000, "backend": "tiled"},
]


def build(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return Transformer(**{**SHAPE, **kwargs}).to(dtype)


def batch(b=2, n=21):
    x, labels = torch.randint(29, (b, n)), torch.randint(29, (b, n))
    labels[0, 3:7] = -100
    mask = torch.ones(b, n, dtype=torch.bool)
    mask[-1, : n // 3] = False
    return x, labels, mask


def loss_and_gradients(model, *args, **kwargs):
    loss = with_seed(lambda: model(*args, **kwargs))
    return loss, *torch.autograd.grad(loss, list(model.parameters()))


# The same numbers in every configuration


@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=str)
def test_rebuilding_is_storing(kwargs):
    """Loss, logits and every gradient, with the same weights; 0.0 apart in exact mode, but for the input's sums."""
    x, labels, mask = batch()
    model, storing = build(**kwargs), build(**kwargs, reversible=False)
    ours, truth = (loss_and_gradients(net, x, labels=labels, mask=mask) for net in (model, storing))
    assert_same(ours, truth, 1e-9)
    if kwargs.get("exact"):
        for (name, _), mine, true in zip(model.named_parameters(), ours[1:], truth[1:], strict=True):
            assert mine.equal(true) or "emb" in name, name


@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=str)
def test_the_loss_is_that_of_the_logits(kwargs):
    x, labels, mask = batch()
    model = build(**kwargs)

    def plain(*args, labels, **kwargs):
        return F.cross_entropy(model(*args, **kwargs).flatten(0, 1), labels.flatten())

    ours = loss_and_gradients(model, x, labels=labels, mask=mask)
    loss = with_seed(lambda: plain(x, labels=labels, mask=mask))
    assert_same(ours, (loss, *torch.autograd.grad(loss, list(model.parameters()))), 1e-9)
    with torch.no_grad():
        assert_same((with_seed(lambda: model(x, labels=labels, mask=mask)),), (loss,), 1e-9)


@pytest.mark.parametrize(
    "pieces", [{"head_chunks": 2}, {"head_chunks": 4, "ff_chunks": 7}, {"loss_chunk_size": 4}], ids=str
)
@pytest.mark.parametrize("kwargs", [{}, {"positions": "rotary", "kv_heads": 2}, {"positions": "alibi"}], ids=str)
def test_pieces_change_nothing(kwargs, pieces):
    x, labels, mask = batch()
    whole = loss_and_gradients(build(**kwargs), x, labels=labels, mask=mask)
    assert_same(loss_and_gradients(build(**kwargs, **pieces), x, labels=labels, mask=mask), whole, 1e-9)


@pytest.mark.parametrize(
    "kwargs", [{}, {"window": 4}, {"positions": "alibi"}, {"kv_heads": 2, "causal": False}], ids=str
)
def test_backends_change_nothing(kwargs):
    x, labels, mask = batch()
    naive = loss_and_gradients(build(**kwargs, backend="naive"), x, labels=labels, mask=mask)
    for backend in ("auto", "tiled"):
        assert_same(loss_and_gradients(build(**kwargs, backend=backend), x, labels=labels, mask=mask), naive, 1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_bfloat16_autocast_is_as_accurate_as_storing(exact):
    x, labels, _ = batch()
    truth = loss_and_gradients(build(), x, labels=labels)
    storing, model = build(torch.float32, reversible=False), build(torch.float32, exact=exact, head_chunks=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, naive = (loss_and_gradients(net, x, labels=labels) for net in (model, storing))
    for name, mine, plain, true in zip(["loss", *dict(model.named_parameters())], ours, naive, truth, strict=True):
        assert mine.dtype == plain.dtype == torch.float32
        scale = true.abs().max().clamp(min=1e-3)
        reference.assert_as_accurate(name, (mine / scale).bfloat16(), (plain / scale).bfloat16(), true / scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_throughout(dtype):
    """Exact mode keeps the streams in fp32, so rebuilding is still storing, to the bit."""
    x, labels, mask = batch()
    ours, truth = (
        loss_and_gradients(build(dtype, exact=True, reversible=reversible), x, labels=labels, mask=mask)
        for reversible in (True, False)
    )
    names = ["loss", *dict(build().named_parameters())]
    for name, mine, true in zip(names, ours, truth, strict=True):
        assert mine.isfinite().all()
        assert difference(mine, true) <= (1e-2 if "emb" in name else 0.0), name


# Labels


def test_no_valid_label_gives_zero_with_zero_gradients():
    model, (x, labels, _) = build(), batch()
    loss, *found = loss_and_gradients(model, x, labels=torch.full_like(labels, -100))
    assert loss == 0
    assert loss.requires_grad
    assert not any(gradient.any() for gradient in found)


def test_another_index_to_ignore():
    model, (x, labels, _) = build(), batch()
    assert_same(
        loss_and_gradients(model, x, labels=labels.masked_fill(labels == -100, 3), ignore_index=3),
        loss_and_gradients(model, x, labels=labels.masked_fill(labels == 3, -100)),
        1e-12,
    )


# Training it


class LowRank(nn.Module):
    """An adapter from outside of the library around a frozen projection."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base, self.in_features = base.requires_grad_(False), base.in_features
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_in_place_of_projections():
    models = [build(reversible=reversible) for reversible in (True, False)]
    for model in models:
        torch.manual_seed(4)
        model.requires_grad_(False)
        for attention, feed_forward in model.layers:
            attention.fn.to_q = LowRank(attention.fn.to_q)
            feed_forward.fn.net[2] = LowRank(feed_forward.fn.net[2])
        model.to_logits[1] = LowRank(model.to_logits[1])
    x, labels, mask = batch()
    adapters = [[p for p in model.parameters() if p.requires_grad] for model in models]
    assert len(adapters[0]) == 3 * 4 + 2
    ours, truth = (
        torch.autograd.grad(model(x, labels=labels, mask=mask), mine)
        for model, mine in zip(models, adapters, strict=True)
    )
    assert_same(ours, truth, 1e-9)


WATCHED = ["layers", "layers.0.0", "layers.0.0.fn", "layers.2.1.fn.net.0", "to_logits", "to_logits.0", "to_logits.1"]


def bend(module, args, out):
    return tuple(bend(module, args, stream) for stream in out) if isinstance(out, tuple) else out + out.square() / 4


@pytest.mark.parametrize("where", WATCHED)
def test_hooks_on_modules_run(where):
    """A hook that changes what a part of the network returns counts, wherever it is; in the loss as in the logits."""
    model, storing = build(), build(reversible=False)
    x, labels, _ = batch()
    before = model(x, labels=labels), model(x)
    for net in (model, storing):
        net.get_submodule(where).register_forward_hook(bend)
    ours, truth = loss_and_gradients(model, x, labels=labels), loss_and_gradients(storing, x, labels=labels)
    assert_same(ours, truth, 1e-9)
    logits = model(x)
    assert_same((F.cross_entropy(logits.flatten(0, 1), labels.flatten()),), ours[:1], 1e-9)
    assert not ours[0].isclose(before[0], rtol=1e-9)
    assert not logits.isclose(before[1], rtol=1e-9).all()


class WithTheTokenBefore(nn.Module):
    def forward(self, x):
        return x + x.roll(1, 1)


@pytest.mark.parametrize("where", ["0", "1"])
def test_a_norm_or_a_last_layer_of_another_kind(where):
    """The loss does not make it chunk by chunk: the norm put here sees all tokens."""
    model, (x, labels, _) = build(loss_chunk_size=5), batch()
    other = WithTheTokenBefore() if where == "0" else nn.Sequential(WithTheTokenBefore(), model.to_logits[1])
    model.to_logits.register_module(where, other)
    loss = F.cross_entropy(model(x).flatten(0, 1), labels.flatten())
    truth = (loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert_same(loss_and_gradients(model, x, labels=labels), truth, 1e-9)


@pytest.mark.parametrize("where", ["layers.1", "layers.2"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_hook_may_not_change_the_streams_between_blocks(where, in_place):
    """What it makes of them could not be rebuilt, and the gradients would be silently wrong."""
    model, storing = build(), build(reversible=False)
    x, labels, _ = batch()

    def change(module, args, out):
        return (out[0].mul_(2), out[1]) if in_place else bend(module, args, out)

    for net in (model, storing):
        net.get_submodule(where).register_forward_hook(change)
    for call in ({}, {"labels": labels}):
        with pytest.raises(ValueError, match="a reversible block's output: expected to reach the next block unchanged"):
            model(x, **call)
    with torch.no_grad():
        assert model(x).equal(storing(x))


def test_hooks_that_only_watch_the_streams():
    model, seen = build(), []
    x, labels, _ = batch()
    truth = loss_and_gradients(model, x, labels=labels)
    for block in model.layers:
        block.register_forward_hook(lambda module, args, out: seen.append([stream.shape for stream in out]))
    assert_same(loss_and_gradients(model, x, labels=labels), truth, 0.0)
    assert seen == 3 * [2 * [(2, 21, 16)]]


@pytest.mark.parametrize("kwargs", [{}, {"exact": True, "head_chunks": 2, "positions": "rotary"}], ids=str)
def test_it_learns_to_copy(kwargs):
    """The second half of a sequence repeats the first: solved only by attention that looks back."""
    model = build(torch.float32, **{"depth": 2, "num_tokens": 8, **kwargs})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        first = torch.randint(8, (32, 8))
        x = torch.cat([first, first], dim=1)
        labels = x[:, 1:].clone()
        labels[:, :7] = -100
        loss = model(x[:, :-1], labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2, "from log 8 = 2.08"


# Odds and ends


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)], ids=str)
def test_few_or_no_tokens(shape):
    model = build(head_chunks=2, ff_chunks=2)
    x = torch.randint(29, shape)
    assert model(x).shape == (*shape, 29)
    loss = model(x, labels=x)
    loss.backward()
    assert loss.isfinite()
    assert loss == 0 or x.numel()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_copies_and_modes():
    model, (x, labels, mask) = build(dropout=0.4), batch()
    clone = copy.deepcopy(model)
    assert_same(loss_and_gradients(clone, x, labels=labels), loss_and_gradients(model, x, labels=labels), 0.0)
    model.eval()
    with torch.no_grad():
        without = model(x, mask=mask)
    assert_same((model(x, mask=mask),), (without,), 1e-12)
    assert not model.train()(x, mask=mask).equal(without)


def test_other_settings_are_attentions():
    model = build(q_bucket_size=3, k_bucket_size=2, backend="tiled", head_chunks=2)
    assert isinstance(model.layers, ReversibleSequence)
    for attention, _ in model.layers:
        fn = attention.fn
        assert (fn.q_bucket_size, fn.k_bucket_size, fn.backend, len(fn.head_groups)) == (3, 2, "tiled", 2)
    with pytest.raises(TypeError, match="q_bucket"):
        build(q_bucket=3)


@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=str)
def test_embeddings_may_come_in_the_place_of_tokens(kwargs):
    """The same loss, logits and gradients, that of the embeddings included, which stay what they were."""
    x, labels, mask = batch()
    model = build(**kwargs)
    embedded = model.token_emb(x).detach().requires_grad_()
    before, weights = embedded.detach().clone(), [p for n, p in model.named_parameters() if n != "token_emb.weight"]
    loss = with_seed(lambda: model(x, labels=labels, mask=mask))
    truth = torch.autograd.grad(loss, [*weights, model.token_emb.weight])
    found = with_seed(lambda: model(embedded, labels=labels, mask=mask))
    *ours, of_embedded = torch.autograd.grad(found, [*weights, embedded])
    assert_same((found, *ours), (loss, *truth[:-1]), 1e-9)
    if not kwargs.get("tie_embeddings"):  # whose weight has a gradient as the head as well
        summed = torch.zeros_like(truth[-1]).index_add_(0, x.flatten(), of_embedded.flatten(0, 1))
        assert_same((summed,), truth[-1:], 1e-9)
    model.eval()
    with torch.no_grad():
        assert_same((model(embedded, mask=mask),), (model(x, mask=mask),), 0.0)
        if model.causal and kwargs.get("window") is None:
            cache = KVCache()
            parts = [model(piece, cache=cache) for piece in embedded.split([9, 12], 1)]
            assert_same((torch.cat(parts, 1),), (model(x),), 1e-9)
    assert embedded.detach().equal(before)


@pytest.mark.parametrize("kind", [(2, 5, 15), (2, 16), (2, 5, 16, 1)], ids=str)
def test_other_shapes_than_embeddings_are_refused(kind):
    with pytest.raises(ValueError, match=r"x: expected .* or embeddings \(batch, tokens, 16\), got torch.float64"):
        build()(torch.zeros(kind, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"labels: expected a number for each token of x, \(2, 5\)"):
        build()(torch.zeros(2, 5, 16, dtype=torch.float64), labels=torch.zeros(2, 4, dtype=torch.long))


def test_no_logits_and_no_stored_layers():
    """Each storage of the step at its largest is a stream's, never one of all hidden values or all logits."""
    model = build(torch.float32, num_tokens=512, max_seq_len=256, ff_chunks=8, head_chunks=4, loss_chunk_size=16)
    x = torch.randint(512, (1, 256))
    with LiveBytes() as count:
        model(x, labels=x).backward()
    stream, weights = 256 * 16 * 4, max(p.nbytes for p in model.parameters())
    assert count.largest <= max(stream, weights)
    assert weights < 256 * 512 * 4


def test_gradients_flow_through_logits_too():
    """Without labels the logits are an ordinary output: any function of them may be differentiated."""
    x, _, mask = batch()
    model, storing = build(head_chunks=2), build(reversible=False)
    ours, truth = (gradients(net(x, mask=mask).softmax(-1), net.parameters()) for net in (model, storing))
    assert_same(ours, truth, 1e-8)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_batches_without_rows_or_tokens(kwargs, exact, shape):
    """Logits of that shape, a loss of 0, gradients of 0, with a mask and without, in training and in generation."""
    model, x, mask = build(**{**kwargs, "exact": exact}), torch.zeros(shape, dtype=torch.long), torch.ones(shape).bool()
    for given in ({}, {"mask": mask}):
        assert model(x, **given).shape == (*shape, 29)
        loss = model(x, labels=x, **given)
        assert loss == 0
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert all(grad is None or not grad.any() for grad in found)
        model(x, **given).sum().backward()
    if model.causal:
        with torch.no_grad():
            cache = KVCache()
            assert model(x, cache=cache, mask=mask).shape == (*shape, 29)
            later = torch.zeros(shape[0], 3, dtype=torch.long)
            seen = torch.ones(shape[0], shape[1] + 3, dtype=torch.bool)
            assert model(later, cache=cache, mask=seen).shape == (shape[0], 3, 29)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_tokens_and_labels_of_every_integer_dtype(dtype):
    torch.manual_seed(0)
    model = Transformer(num_tokens=20, max_seq_len=16, dim=16, depth=1, heads=2, dim_head=8, causal=True)
    tokens = torch.randint(0, 20, (2, 9))
    mask = torch.arange(9) > torch.tensor([[-1], [2]])
    assert torch.equal(model(tokens.to(dtype)), model(tokens))
    assert torch.equal(model(tokens.to(dtype), labels=tokens.to(dtype)), model(tokens, labels=tokens))
    wrapped = AutoregressiveWrapper(model)
    assert torch.equal(wrapped(tokens.to(dtype), mask=mask), wrapped(tokens, mask=mask))
    assert torch.equal(
        wrapped.generate(tokens.to(dtype), 3, temperature=0.0), wrapped.generate(tokens, 3, temperature=0.0)
    )
