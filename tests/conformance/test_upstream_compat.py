"""Code and weights from the package that this one replaces work unchanged: names, signatures, state, numbers."""

import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn

from memory_efficient_attention_pytorch import (
    Attention,
    CosineSimAttention,
    FeedForward,
    FlashAttention,
    PreNorm,
    ReversibleSequence,
    Transformer,
)
from tests import reference

PACKAGE = "memory_efficient_attention_pytorch"
NAMES = {
    "": [
        "Attention",
        "FlashAttention",
        "CosineSimAttention",
        "memory_efficient_attention",
        "numerically_unstable_memory_efficient_attention",
    ],
    ".memory_efficient_attention": ["attention", "memory_efficient_attention", "Attention"],
    ".flash_attention": ["FlashAttention", "FlashAttentionFunction"],
    ".cosine_sim_flash_attention": ["FlashAttention", "FlashAttentionFunction"],
    ".memory_efficient_cosine_sim_attention": [
        "CosineSimAttention",
        "attention",
        "numerically_unstable_memory_efficient_attention",
    ],
    ".reversible": ["ReversibleSequence"],
    ".transformer": ["Transformer", "FeedForward", "PreNorm"],
    ".autoregressive_wrapper": ["AutoregressiveWrapper"],
}
OWN_NAMES = [
    *("Attention", "FlashAttention", "CosineSimAttention", "dot_product_attention", "select_backend"),
    *("ReversibleSequence", "Chunked", "FeedForward", "PreNorm", "linear_cross_entropy", "Transformer"),
    *("AutoregressiveWrapper", "plan", "max_seq_len", "AlibiBias", "RelativePositionBias"),
]
SHAPE = {"num_tokens": 23, "max_seq_len": 40, "dim": 16, "depth": 3, "heads": 2, "dim_head": 8}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_upstream_names(module, name):
    assert callable(getattr(importlib.import_module(PACKAGE + module), name))


@pytest.mark.parametrize("name", OWN_NAMES)
def test_own_names(name):
    assert callable(getattr(importlib.import_module(PACKAGE), name))


def test_function_named_like_its_module():
    """`from package import memory_efficient_attention` is the function, as upstream; the module stays importable."""
    from memory_efficient_attention_pytorch import memory_efficient_attention as function
    from memory_efficient_attention_pytorch.memory_efficient_attention import memory_efficient_attention

    assert function is memory_efficient_attention


def parameters_of(function):
    return list(inspect.signature(function).parameters)


def test_signatures_begin_as_upstreams():
    from memory_efficient_attention_pytorch import memory_efficient_attention

    forward = ["self", "x", "context", "mask", "attn_bias", "memory_efficient", "q_bucket_size", "k_bucket_size"]
    assert parameters_of(Attention.forward)[:8] == forward
    assert parameters_of(CosineSimAttention.forward)[:8] == forward
    function = ["q", "k", "v", "mask", "causal", "attn_bias", "q_bucket_size", "k_bucket_size", "eps", "dropout"]
    assert parameters_of(memory_efficient_attention)[:11] == [*function, "training"]
    assert parameters_of(FeedForward)[:3] == ["dim", "mult", "chunks"]
    assert parameters_of(PreNorm) == ["dim", "fn"]
    assert parameters_of(ReversibleSequence)[:2] == ["blocks", "args_route"]
    assert parameters_of(Transformer.forward)[:3] == ["self", "x", "labels"]


def test_flash_forward_takes_upstreams_positions():
    """Upstream's FlashAttention.forward(x, context, mask, q_bucket_size, k_bucket_size): the buckets by keyword."""
    net, x = FlashAttention(dim=16, heads=2, dim_head=8), torch.randn(2, 9, 16)
    mask = torch.rand(2, 7) > 0.4
    context = torch.randn(2, 7, 16)
    truth = reference.attention_layer(
        x, net.to_q.weight, net.to_kv.weight, net.to_out.weight, heads=2, context=context, mask=mask
    )
    reference.assert_close("out", net(x, context, mask, q_bucket_size=4, k_bucket_size=3), truth, 1e-5)


def build(state, kind=Transformer, **kwargs):
    model = kind(**SHAPE, **kwargs)
    model.load_state_dict(state)
    return model


def test_parameter_names_and_shapes():
    """Upstream's keys, each tensor once."""
    expected = reference.upstream_state_dict(**SHAPE, duplicated=False)
    model = Transformer(**SHAPE)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in expected.items()}
    assert {name for name, _ in model.named_parameters()} == set(expected)


@pytest.mark.parametrize("duplicated", [False, True])
def test_upstream_state_loads(duplicated):
    state = reference.upstream_state_dict(**SHAPE, duplicated=duplicated)
    keys = set(state)
    model = build(state)
    assert set(state) == keys, "the caller's dictionary is left alone"
    for name, parameter in model.named_parameters():
        assert parameter.equal(state[name]), name


def test_upstream_state_of_another_model_is_refused():
    state = reference.upstream_state_dict(**SHAPE | {"depth": 4})
    with pytest.raises(RuntimeError, match=r"layers\.3"):
        build(state)
    state = reference.upstream_state_dict(**SHAPE)
    del state["layers.1.0.fn.to_q.weight"], state["net.blocks.1.f.net.fn.to_q.weight"]
    with pytest.raises(RuntimeError, match=r"layers\.1\.0\.fn\.to_q\.weight"):
        build(state)


def test_safetensors_round_trip(tmp_path):
    model = build(reference.upstream_state_dict(**SHAPE))
    save_model(model, str(tmp_path / "model.safetensors"))
    other = Transformer(**SHAPE)
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


CONFIGURATIONS = [
    {},
    {"causal": True},
    {"causal": True, "use_flash_attn": False},
    {"causal": True, "ff_chunks": 3},
    {"causal": True, "q_bucket_size": 8, "k_bucket_size": 5},
    {"causal": True, "reversible": False},
    {"causal": True, "head_chunks": 2, "loss_chunk_size": 7},
]


def compare_with_definition(model, state, *, tokens, labels, causal, mask=None):
    """Logits, loss and the gradient of every parameter against the plain definition with the same weights in fp64."""
    masked = {} if mask is None else {"mask": mask}
    true_weights = {name: p.detach().double().requires_grad_() for name, p in state.items()}
    real = slice(None) if mask is None else mask
    what = {"heads": SHAPE["heads"], "causal": causal, "mask": mask}
    true_logits = reference.transformer(true_weights, tokens, **what)
    reference.assert_close("logits", model(tokens, **masked)[real], true_logits[real], 1e-5)
    true_loss = reference.transformer_loss(true_weights, tokens, labels, **what)
    loss = model(tokens, labels=labels, **masked)
    assert loss.shape == ()
    reference.assert_close("loss", loss, true_loss, 1e-5)
    truth = dict(zip(true_weights, torch.autograd.grad(true_loss, list(true_weights.values())), strict=True))
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, ours, strict=True):
        error = torch.linalg.vector_norm(gradient.double() - truth[name])
        allowed = 1e-4 * torch.linalg.vector_norm(truth[name]) + 1e-9
        assert error <= allowed, f"gradient of {name} is off by {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=str)
def test_outputs_loss_and_gradients(kwargs):
    state = reference.upstream_state_dict(**SHAPE, duplicated=False)
    tokens, labels = torch.randint(23, (2, 37)), torch.randint(23, (2, 37))
    causal = kwargs.get("causal", False)
    compare_with_definition(build(state, **kwargs), state, tokens=tokens, labels=labels, causal=causal)


@pytest.mark.parametrize("autocast", [False, True])
def test_exact_mode_has_the_gradients_of_storing_everything(autocast):
    """Bit for bit in every layer; its outputs differ from the definition's by no more than the grid of 2^-16 makes."""
    state = reference.upstream_state_dict(**SHAPE, duplicated=False)
    tokens, labels = torch.randint(23, (2, 37)), torch.randint(23, (2, 37))
    models = [build(state, causal=True, exact=True, reversible=reversible) for reversible in (True, False)]
    truth = reference.transformer({name: p.double() for name, p in state.items()}, tokens, heads=2, causal=True)
    reference.assert_close("logits", models[0](tokens), truth, 1e-3)
    gradients = []
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=labels)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), ours, true in zip(models[0].named_parameters(), *gradients, strict=True):
        # The input's cotangent is a sum of several, whose order is autograd's own.
        reference.assert_close(name, ours, true, 1e-6 if "emb" in name else 0.0)


def test_labels_to_ignore():
    state = reference.upstream_state_dict(**SHAPE, duplicated=False)
    tokens, labels = torch.randint(23, (2, 37)), torch.randint(23, (2, 37))
    labels[0, :20] = -100
    compare_with_definition(build(state, causal=True), state, tokens=tokens, labels=labels, causal=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_batches(causal, side):
    """A padded row equals its own run without the padding, its positions counted from its first token."""
    state = reference.upstream_state_dict(**SHAPE, duplicated=False)
    model = build(state, causal=causal)
    tokens, labels = torch.randint(23, (3, 17)), torch.randint(23, (3, 17))
    length = torch.tensor([17, 9, 1])[:, None]
    mask = torch.arange(17) >= 17 - length if side == "left" else torch.arange(17) < length
    labels[~mask] = -100
    compare_with_definition(model, state, tokens=tokens, labels=labels, causal=causal, mask=mask)
    logits = model(tokens, mask=mask)
    for row in range(3):
        alone = model(tokens[row][mask[row]][None])[0]
        reference.assert_close("row", logits[row][mask[row]], alone, 1e-5)


def test_shorter_inputs_than_the_longest():
    state = reference.upstream_state_dict(**SHAPE, duplicated=False)
    model, weights = build(state, causal=True), {name: t.double() for name, t in state.items()}
    for n in (1, 7, 40):
        tokens = torch.randint(23, (2, n))
        truth = reference.transformer(weights, tokens, heads=2, causal=True)
        reference.assert_close("logits", model(tokens), truth, 1e-5)


class SeedsTransformer(nn.Module):
    """How a user of the upstream package writes the network: layers of pairs, handed to ReversibleSequence."""

    def __init__(
        self,
        *,
        num_tokens,
        max_seq_len,
        dim,
        depth,
        heads,
        dim_head,
        causal=False,
        ff_mult=4,
        ff_chunks=1,
        use_flash_attn=True,
        **attention_kwargs,
    ):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(max_seq_len, dim)

        def pair():
            kwargs = {"dim": dim, "heads": heads, "dim_head": dim_head, "causal": causal} | attention_kwargs
            attend = FlashAttention(**kwargs) if use_flash_attn else Attention(**kwargs, memory_efficient=True)
            feed = FeedForward(dim=dim, mult=ff_mult, chunks=ff_chunks)
            return nn.ModuleList([PreNorm(dim, attend), PreNorm(dim, feed)])

        self.layers = nn.ModuleList([pair() for _ in range(depth)])
        self.net = ReversibleSequence(self.layers)
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_tokens))

    def forward(self, x, labels=None):
        positions = torch.arange(x.shape[-1], device=x.device)
        logits = self.to_logits(self.net(self.token_emb(x) + self.pos_emb(positions)))
        return logits if labels is None else F.cross_entropy(logits.transpose(1, 2), labels)


@pytest.mark.parametrize(
    "kwargs", [{}, {"causal": True}, {"causal": True, "use_flash_attn": False, "ff_chunks": 4}], ids=str
)
def test_the_seeds_own_transformer(kwargs):
    state = reference.upstream_state_dict(**SHAPE, duplicated=False)
    tokens, labels = torch.randint(23, (2, 37)), torch.randint(23, (2, 37))
    model = SeedsTransformer(**SHAPE, **kwargs)
    model.load_state_dict(state, strict=False)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(state), "each parameter once, under upstream's name"
    compare_with_definition(model, state, tokens=tokens, labels=labels, causal=kwargs.get("causal", False))
    ours = build(state, **kwargs)
    reference.assert_close("logits", ours(tokens), model(tokens), 1e-5)


def test_the_seeds_own_transformer_loads_upstreams_whole_state():
    """Upstream saved every layer twice; the same class built on this package takes that dictionary strictly."""
    state = reference.upstream_state_dict(**SHAPE)
    model = build(state, kind=SeedsTransformer)
    for name, parameter in model.named_parameters():
        assert parameter.equal(state[name]), name


@pytest.mark.parametrize("kind", [Transformer, SeedsTransformer])
@pytest.mark.parametrize("saved", [SeedsTransformer, Transformer])
def test_each_transformer_loads_the_others_state(saved, kind):
    """That of the seed's class has every layer twice, ``layers.*`` and ``net.*``; either half will do."""
    torch.manual_seed(1)
    state = saved(**SHAPE).state_dict()
    doubled = {name for name in state if name.startswith("net.")}
    assert bool(doubled) == (saved is SeedsTransformer)
    halves = [state] if not doubled else [state, {name: t for name, t in state.items() if name not in doubled}]
    if doubled:
        halves.append({name: t for name, t in state.items() if not name.startswith("layers.")})
    for half in halves:
        if (kind is SeedsTransformer and len(half) < len(state)) or (kind, saved) == (SeedsTransformer, Transformer):
            with pytest.raises(RuntimeError, match="Missing key"):
                kind(**SHAPE).load_state_dict(half)
            continue
        torch.manual_seed(2)
        model = kind(**SHAPE)
        before = dict(half)
        model.load_state_dict(half)
        assert half.keys() == before.keys(), "the caller's dictionary stays"
        for name, parameter in model.named_parameters():
            assert parameter.equal(state[name]), name


FOREIGN = [
    *("blocks.0.attn.weight", "blocks.0.f.net", "blocks.0", "blocks", "blocks.", "blocks.x.f.net.norm.weight"),
    *("blocks.0.h.net.norm.weight", "blocks.0.f.body.norm.weight", "blocks.9.f.net.norm.weight", "9.0.norm.weight"),
    *("blocks.0.f.net.fn.rotary", "0.0.fn.lora", "0", ""),
]


@pytest.mark.parametrize("prefix", ["layers.", "net.", "net.layers."])
@pytest.mark.parametrize("key", FOREIGN)
def test_keys_of_others_are_reported_under_their_own_names(prefix, key):
    model = Transformer(**SHAPE)
    for net, outer in ((model, ""), (nn.ModuleDict({"inner": model}), "inner.")):
        state = net.state_dict() | {f"{outer}{prefix}{key}": torch.zeros(1)}
        found = net.load_state_dict(state, strict=False)
        assert found.unexpected_keys == [f"{outer}{prefix}{key}"]
        assert found.missing_keys == []
        with pytest.raises(RuntimeError, match="Unexpected key"):
            net.load_state_dict(state)


def test_upstreams_names_of_another_depth_are_reported():
    state = reference.upstream_state_dict(**{**SHAPE, "depth": 3})
    found = Transformer(**{**SHAPE, "depth": 2}).load_state_dict(state, strict=False)
    assert found.missing_keys == []
    assert {name.split(".fn.")[0].split(".norm.")[0] for name in found.unexpected_keys} == {
        *("layers.2.0", "layers.2.1", "net.blocks.2.f.net", "net.blocks.2.g.net")
    }


def test_argument_routes_accept_pairs_of_booleans_per_block():
    class Gate(nn.Module):
        def forward(self, x, mask=None):
            return torch.tanh(x) if mask is None else torch.tanh(x) * mask[..., None]

    x, mask = torch.randn(2, 5, 8), torch.rand(2, 5) > 0.5
    net = ReversibleSequence(((Gate(), Gate()) for _ in range(2)), args_route={"mask": ((True, False), (False, True))})
    first = x + torch.tanh(x) * mask[..., None]
    second = x + torch.tanh(first)
    first = first + torch.tanh(second)
    second = second + torch.tanh(first) * mask[..., None]
    torch.testing.assert_close(net(x, mask=mask), first + second)
