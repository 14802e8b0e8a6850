"""Everything of the package that can be differentiated, each beside the same computed by PyTorch's autograd alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_efficient_attention_pytorch import (
    Attention,
    Chunked,
    CosineSimAttention,
    FeedForward,
    FlashAttention,
    PreNorm,
    ReversibleSequence,
    Transformer,
    dot_product_attention,
    linear_cross_entropy,
)
from memory_efficient_attention_pytorch.flash_attention import FlashAttentionFunction
from memory_efficient_attention_pytorch.memory_efficient_attention import memory_efficient_attention
from tests import reference
from tests.agreement import gradients
from tests.branches import IN_PIECES, TokenMLP, layers, plain
from tests.conformance.cases import PATHS, LearnedBias

B, N, DIM, HEADS, VOCABULARY = 2, 7, 8, 2, 11
PADDING = torch.arange(N)[None] >= torch.tensor([[0], [2]])
f64 = torch.float64


@dataclass
class Subject:
    """`net(*inputs)`, and its `truth`: the same from the same leaves, with nothing computed twice and nothing dropped.

    `drops`: it has dropout, which no truth could draw likewise, since pieces draw in an order of their own. `once`: a
    second derivative is refused; else it is right or refused. `smooth`: finite differences can tell.
    """

    net: nn.Module
    truth: Callable[..., Tensor]
    make_inputs: Callable[[], tuple[Tensor, ...]]
    once: bool = True
    dtype: torch.dtype = f64
    tolerance: float = 1e-9
    smooth: bool = True
    drops: bool = False

    def __post_init__(self) -> None:
        for module in (self.net, self.truth):
            if isinstance(module, nn.Module):
                module.to(self.dtype)
        self.inputs = self.more_inputs()

    def more_inputs(self) -> tuple[Tensor, ...]:
        made = self.make_inputs()
        return tuple(x.to(self.dtype).requires_grad_() if x.is_floating_point() else x for x in made)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (*self.inputs, *self.net.parameters()) if x.is_floating_point()]

    def __call__(self) -> Tensor:
        return self.net(*self.inputs)

    def true_gradients(self) -> tuple[Tensor | None, ...]:
        return gradients(self.truth(*self.inputs), self.leaves)


class Function(nn.Module):
    """A function of tensors as a module, with the modules among its arguments."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function, self.modules_given = function, nn.ModuleDict(modules)

    def forward(self, *tensors):
        return self.function(*tensors, **self.modules_given)


def randn(*shapes):
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def shared(other: nn.Module, net: nn.Module) -> nn.Module:
    """`other` with the parameters of `net`, which has them by the same names."""
    given = dict(net.named_parameters(remove_duplicate=False))
    for name, _ in list(other.named_parameters(remove_duplicate=False)):
        module, _, attribute = name.rpartition(".")
        setattr(other.get_submodule(module), attribute, given[name])
    return other


# Attention

QKV = randn((B, 2 * HEADS, N, 4), (B, HEADS, N, 4), (B, HEADS, N, 4))
SEEN = {"causal": True, "mask": PADDING}
BUCKETS = {"q_bucket_size": 4, "k_bucket_size": 3}


def function(backend, **kwargs):
    flags = {"once": backend != "naive"}
    if backend == "onednn":  # its tiles are for fp32
        flags |= {"dtype": torch.float32, "tolerance": 1e-5, "smooth": False}
    seen = {"causal": True} if backend == "fused" else SEEN
    net = Function(lambda q, k, v: dot_product_attention(q, k, v, backend=backend, **seen, **BUCKETS, **kwargs))
    return Subject(net, lambda q, k, v: reference.attention(q, k, v, **seen), QKV, drops=bool(kwargs), **flags)


def biased(backend):
    """A bias tensor with a gradient, reduced over the dimension of heads, and as many queries as it takes tiles."""

    def ours(q, k, v, bias):
        return dot_product_attention(q, k, v, attn_bias=bias, backend=backend, **SEEN, **BUCKETS)

    shapes = randn((B, HEADS, N, 4), (B, HEADS, N, 4), (B, HEADS, N, 3), (B, 1, N, N))
    truth = lambda q, k, v, bias: reference.attention(q, k, v, attn_bias=bias, **SEEN)  # noqa: E731
    return Subject(Function(ours), truth, shapes, once=backend != "naive")


def bias_module(backend):
    net = Function(
        lambda q, k, v, bias: dot_product_attention(q, k, v, attn_bias=bias, backend=backend, **SEEN, **BUCKETS),
        bias=LearnedBias(2 * HEADS),
    )
    return Subject(
        net,
        lambda q, k, v: reference.attention(q, k, v, attn_bias=net.modules_given["bias"], **SEEN),
        QKV,
        once=backend != "naive",
    )


class LearnedCap(nn.Module):
    """A function of the score with parameters: capped, and shifted by head and distance."""

    def __init__(self):
        super().__init__()
        self.cap, self.table = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(2 * HEADS, 2 * N))

    def forward(self, score, b, h, i, j):
        return self.cap * torch.tanh(score / self.cap) + self.table[h, i - j + N]


def score_places():
    return [torch.arange(s).view([-1 if a == d else 1 for d in range(4)]) for a, s in enumerate((B, 2 * HEADS, N, N))]


def attended(scores, v):
    """The rest of attention from its scores, causal and padded."""
    seen = PADDING[:, None, None] & torch.ones(N, N, dtype=torch.bool).tril()
    hidden_row = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, -torch.inf).masked_fill(hidden_row, 0.0).softmax(-1).masked_fill(~seen, 0.0)
    return weights @ v.repeat_interleave(2, 1)


def score_function(backend):
    """A closure over tensors, beside a mask that is one too."""

    def ours(q, k, v, table):
        return dot_product_attention(
            *(q, k, v),
            attn_bias=lambda score, b, h, i, j: 2 * torch.tanh(score / 2) * table[h, i],
            mask=lambda b, h, i, j: PADDING[b, j] & (i >= j),
            backend=backend,
            **BUCKETS,
        )

    def definition(q, k, v, table):
        scores = q @ k.repeat_interleave(2, 1).mT / 2
        return attended(2 * torch.tanh(scores / 2) * table[..., None], v)

    inputs = lambda: (*QKV(), torch.randn(2 * HEADS, N))  # noqa: E731
    return Subject(Function(ours), definition, inputs, once=backend != "naive")


def score_module(backend):
    net = Function(
        lambda q, k, v, cap: dot_product_attention(q, k, v, attn_bias=cap, backend=backend, **SEEN, **BUCKETS),
        cap=LearnedCap(),
    )

    def definition(q, k, v):
        return attended(net.modules_given["cap"](q @ k.repeat_interleave(2, 1).mT / 2, *score_places()), v)

    return Subject(net, definition, QKV, once=backend != "naive")


def log_sum_exp():
    def ours(q, k, v):
        out, lse = dot_product_attention(q, k, v, backend="naive", causal=True, return_lse=True)
        return out * lse[..., None].sin()

    def truth(q, k, v):
        return reference.attention(q, k, v, causal=True) * reference.log_sum_exp(q, k, causal=True)[..., None].sin()

    return Subject(Function(ours), truth, QKV, once=False)


OF_0_1 = {
    "flash": lambda q, k, v: FlashAttentionFunction.apply(q, k, v, PADDING, True, 4, 3),
    "memory_efficient": lambda q, k, v: memory_efficient_attention(q, k, v, mask=PADDING, causal=True, **BUCKETS),
}


def of_0_1(name):
    shapes = randn(*3 * [(B, HEADS, N, 4)])
    return Subject(Function(OF_0_1[name]), lambda q, k, v: reference.attention(q, k, v, **SEEN), shapes)


X = randn((B, N, DIM))
ATTENTION = {"dim": DIM, "heads": HEADS, "dim_head": 4, **BUCKETS}


def attention_layer(kind=Attention, once=True, **kwargs):
    net = kind(**ATTENTION, causal=True, **kwargs)
    weights = net.to_q, net.to_kv, net.to_out
    options = {"heads": HEADS, "causal": True, "kv_heads": net.kv_heads, "window": net.window}
    truth = lambda x: reference.attention_layer(x, *(layer.weight for layer in weights), **options)  # noqa: E731
    return Subject(net, truth, X, once=once, drops=net.dropout > 0)


def cross_attention():
    net = FlashAttention(**ATTENTION, head_chunks=2)
    weights = net.to_q, net.to_kv, net.to_out

    def truth(x, context):
        return reference.attention_layer(x, *(layer.weight for layer in weights), heads=HEADS, context=context)

    return Subject(net, truth, randn((B, N, DIM), (B, N + 2, DIM)))


def cosine(once=True, **kwargs):
    net = CosineSimAttention(**ATTENTION, seq_len=N, causal=True, **kwargs)
    weights = net.to_q, net.to_kv, net.to_out

    def truth(x):
        return reference.cosine_attention_layer(
            x, *(layer.weight for layer in weights), net.scale, heads=HEADS, causal=True
        )

    return Subject(net, truth, X, once=once)


# Branches, and two streams of them


def feed_forward(chunks, once=True):
    net = FeedForward(DIM, 2, chunks=chunks)
    return Subject(net, net.net, X, once=once)


def pre_norm(fn):
    net = PreNorm(DIM, fn)
    return Subject(net, lambda x: fn.net(net.norm(x)), X, once=False)


def chunked(**kwargs):
    net = Chunked(TokenMLP(DIM, hidden=12, **kwargs), chunks=3)
    return Subject(net, net.module, X, drops=bool(kwargs))


def reversible(make, whole=None, exact=False, **kwargs):
    """Against the same with activations stored; where branches are in pieces, against the whole branches."""
    net = ReversibleSequence(make(depth=2, **kwargs), exact=exact)
    stored = ReversibleSequence((whole or make)(depth=2), exact=exact, reversible=False)
    return Subject(net, shared(stored, net), X, smooth=not exact, drops=bool(kwargs))


def in_pieces(**kwargs):
    return layers(heads=HEADS, head_chunks=2, ff_chunks=3, **kwargs)


def whole(**kwargs):
    return layers(heads=HEADS, backend="naive", **kwargs)


def stored_in_pieces():
    net = ReversibleSequence(in_pieces(depth=2), reversible=False)
    return Subject(net, shared(ReversibleSequence(whole(depth=2), reversible=False), net), X)


# The loss, and whole models


class Head(nn.Module):
    """The loss with its weight and bias, some labels ignored."""

    def __init__(self, loss=linear_cross_entropy, vocabulary=VOCABULARY, **options):
        super().__init__()
        self.loss, self.options = loss, options
        self.weight = nn.Parameter(torch.randn(vocabulary, DIM) / DIM**0.5)
        self.bias = nn.Parameter(torch.randn(vocabulary))

    def forward(self, hidden):
        labels = (torch.arange(B * N).view(B, N) * 5) % len(self.weight)
        labels[0, :3] = -100
        return self.loss(hidden, self.weight, labels, bias=self.bias, **self.options)


def plain_loss(hidden, weight, labels, *, bias, **options):
    loss = F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten(), **options)
    return loss.view(labels.shape) if loss.ndim else loss


def loss(reduction, vocabulary=VOCABULARY, label_smoothing=0.0):
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    net = Head(chunk_size=4, vocabulary=vocabulary, **options)
    return Subject(net, shared(Head(plain_loss, vocabulary, **options), net), X)


SHAPE = {"num_tokens": VOCABULARY, "max_seq_len": N, "dim": DIM, "depth": 2, "heads": 4, "dim_head": 2, "causal": True}


class WithLoss(nn.Module):
    def __init__(self, model, chunked=True):
        super().__init__()
        self.model, self.chunked = model, chunked

    def forward(self, x):
        labels = x.roll(-1, 1).masked_fill(~PADDING, -100)
        if self.chunked:
            return self.model(x, labels=labels, mask=PADDING)
        return F.cross_entropy(self.model(x, mask=PADDING).flatten(0, 1), labels.flatten())


def transformer(**kwargs):
    """The model's own loss against that of the logits of a model that stores everything, with the plain attention.

    In exact mode against the same branches, since a last bit decides to which side a value is rounded.
    """
    model = Transformer(**{**SHAPE, **kwargs})
    net, tokens = WithLoss(model), lambda: (torch.randint(VOCABULARY, (B, N)),)
    simple = {} if kwargs.get("exact") else {"head_chunks": 1, "ff_chunks": 1, "backend": "naive"}
    stored = Transformer(**{**SHAPE, **kwargs, **simple, "reversible": False, "keep_attention": False})
    flags = {"smooth": not kwargs.get("exact"), "drops": "dropout" in kwargs}
    return Subject(net, shared(WithLoss(stored, chunked=False), net), tokens, **flags)


def logits(**kwargs):
    net = Transformer(**{**SHAPE, **kwargs})
    stored = Transformer(**{**SHAPE, **kwargs, "reversible": False, "backend": "naive"})
    return Subject(net, shared(stored, net), lambda: (torch.randint(VOCABULARY, (B, N)),))


SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{f"function, {backend}": lambda b=backend: function(b) for backend in PATHS},
    **{f"bias, {backend}": lambda b=backend: biased(b) for backend in ("naive", "tiled")},
    "bias module, tiled": lambda: bias_module("tiled"),
    "score function, tiled": lambda: score_function("tiled"),
    "score module, tiled": lambda: score_module("tiled"),
    "log-sum-exp": log_sum_exp,
    **{f"of version 0.1, {name}": lambda n=name: of_0_1(n) for name in OF_0_1},
    "attention": lambda: attention_layer(once=False),
    "attention, naive": lambda: attention_layer(once=False, backend="naive"),
    "attention, memory-efficient": lambda: attention_layer(memory_efficient=True),
    "attention, head groups": lambda: attention_layer(head_chunks=2),
    "attention, head groups of one key head": lambda: attention_layer(head_chunks=2, kv_heads=1, window=3),
    "attention, head groups, context": cross_attention,
    "flash attention": lambda: attention_layer(FlashAttention, window=(3, 0)),
    "cosine": lambda: cosine(once=False),
    "cosine, head groups": lambda: cosine(head_chunks=2),
    "feed-forward": lambda: feed_forward(1, once=False),
    "feed-forward in chunks": lambda: feed_forward(3),
    "norm before": lambda: pre_norm(FeedForward(DIM, 2, chunks=1)),
    "norm before chunks": lambda: pre_norm(FeedForward(DIM, 2, chunks=3)),
    "chunked": chunked,
    "reversible": lambda: reversible(plain),
    "reversible, layers": lambda: reversible(layers),
    "reversible, pieces": lambda: reversible(in_pieces, whole),
    "reversible, attention kept": lambda: reversible(lambda **k: in_pieces(keep_attention=True, **k), whole),
    "reversible no more": stored_in_pieces,
    "exact": lambda: reversible(plain, exact=True),
    "exact, pieces": lambda: reversible(lambda **k: layers(**IN_PIECES, **k), exact=True),
    **{f"loss, {reduction}": lambda r=reduction: loss(r) for reduction in ("none", "mean", "sum")},
    "loss, more words than tokens": lambda: loss("mean", vocabulary=3 * B * N, label_smoothing=0.1),
    "transformer": transformer,
    "transformer, logits in pieces": lambda: logits(head_chunks=2, ff_chunks=3),
    "transformer, pieces": lambda: transformer(head_chunks=2, ff_chunks=3, loss_chunk_size=4, num_tokens=37),
    "transformer, rotary": lambda: transformer(positions="rotary", kv_heads=2, head_chunks=2),
    "transformer, alibi": lambda: transformer(positions="alibi", head_chunks=4, ff_chunks=3),
    "transformer, tied": lambda: transformer(positions="none", window=3, tie_embeddings=True),
    "transformer, plain attention": lambda: transformer(use_flash_attn=False, causal=False, tie_embeddings=True),
    "transformer, exact": lambda: transformer(exact=True, ff_chunks=4, kv_heads=1),
    "transformer, attention kept": lambda: transformer(keep_attention=True, head_chunks=2),
    "transformer, stored": lambda: transformer(reversible=False, head_chunks=2, ff_chunks=2),
}
DROPPING: dict[str, Callable[[], Subject]] = {
    **{f"function, {backend}": lambda b=backend: function(b, dropout=0.3) for backend in ("naive", "tiled", "auto")},
    "attention, head groups": lambda: attention_layer(head_chunks=2, dropout=0.3),
    "flash attention": lambda: attention_layer(FlashAttention, dropout=0.3),
    "chunked": lambda: chunked(dropout=0.5),
    "reversible": lambda: reversible(plain, dropout=0.5),
    "reversible, pieces": lambda: reversible(in_pieces, whole, dropout=0.3),
    "exact": lambda: reversible(plain, exact=True, dropout=0.5),
    "transformer": lambda: transformer(dropout=0.3),
    "transformer, pieces": lambda: transformer(dropout=0.3, head_chunks=2, ff_chunks=2),
    "transformer, attention kept": lambda: transformer(dropout=0.3, head_chunks=2, keep_attention=True),
}
EVERYTHING = {**SUBJECTS, **{f"{name}, dropping": make for name, make in DROPPING.items()}}
