"""A user's mistake is a ValueError (or NotImplementedError) that names the argument; nothing is guessed or ignored."""

import math

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import (
    AlibiBias,
    Attention,
    Chunked,
    CosineSimAttention,
    FeedForward,
    FlashAttention,
    PreNorm,
    RelativePositionBias,
    ReversibleSequence,
    Transformer,
    dot_product_attention,
    select_backend,
)

REFUSAL = (ValueError, NotImplementedError)


def qkv(b=2, h=4, kv=2, n=5, m=6, d=8, e=8, dtype=torch.float32, device="cpu"):
    shapes = ((b, h, n, d), (b, kv, m, d), (b, kv, m, e))
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in zip("qkv", shapes, strict=True)}


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


# name: (what is wrong, the word that must be in the message)
WRONG = {
    "q of three dimensions": ({"q": zeros(4, 5, 8)}, "q"),
    "k of three dimensions": ({"k": zeros(2, 6, 8)}, "k"),
    "v of five dimensions": ({"v": zeros(1, 2, 2, 6, 8)}, "v"),
    "another batch in k": ({"k": zeros(3, 2, 6, 8)}, "k"),
    "another batch in v": ({"v": zeros(3, 2, 6, 8)}, "v"),
    "another width in k": ({"k": zeros(2, 2, 6, 7)}, "k"),
    "another length in v": ({"v": zeros(2, 2, 7, 8)}, "v"),
    "other heads in v": ({"v": zeros(2, 1, 6, 8)}, "v"),
    "heads not a multiple": ({"k": zeros(2, 3, 6, 8), "v": zeros(2, 3, 6, 8)}, "heads?"),
    "more key heads than query heads": ({"k": zeros(2, 8, 6, 8), "v": zeros(2, 8, 6, 8)}, "heads?"),
    "integer q": (qkv(dtype=torch.int64), "q"),
    "complex q": (qkv(dtype=torch.complex64), "q"),
    "k of another dtype": ({"k": zeros(2, 2, 6, 8, dtype=torch.float64)}, "k"),
    "v of another dtype": ({"v": zeros(2, 2, 6, 8, dtype=torch.bfloat16)}, "v"),
    "k on another device": ({"k": zeros(2, 2, 6, 8, device="meta")}, "k"),
    "v on another device": ({"v": zeros(2, 2, 6, 8, device="meta")}, "v"),
    "q not a tensor": ({"q": [[1.0]]}, "q"),
    "float mask": ({"mask": torch.ones(2, 6)}, "mask"),
    "integer mask": ({"mask": torch.ones(2, 6, dtype=torch.int64)}, "mask"),
    "mask of another length": ({"mask": torch.ones(2, 7) > 0}, "mask"),
    "mask of another batch": ({"mask": torch.ones(3, 1, 1, 6) > 0}, "mask"),
    "mask of five dimensions": ({"mask": torch.ones(1, 2, 4, 5, 6) > 0}, "mask"),
    "mask on another device": ({"mask": torch.ones(2, 6, device="meta") > 0}, "mask"),
    "bias of another shape": ({"attn_bias": zeros(4, 5, 7)}, "attn_bias"),
    "bias of the key heads": ({"attn_bias": zeros(1, 2, 5, 6)}, "attn_bias"),
    "integer bias": ({"attn_bias": zeros(5, 6, dtype=torch.int64)}, "attn_bias"),
    "boolean bias": ({"attn_bias": zeros(5, 6, dtype=torch.bool)}, "attn_bias"),
    "bias on another device": ({"attn_bias": zeros(5, 6, device="meta")}, "attn_bias"),
    "bias that is a number": ({"attn_bias": 0.5}, "attn_bias"),
    "negative window": ({"window": -1}, "window"),
    "negative side of a window": ({"window": (3, -1)}, "window"),
    "window of three": ({"window": (1, 2, 3)}, "window"),
    "fractional window": ({"window": 2.5}, "window"),
    "documents of another length": ({"document_ids": torch.zeros(2, 9, dtype=torch.int64)}, "document_ids"),
    "documents of another batch": ({"document_ids": torch.zeros(3, 5, dtype=torch.int64)}, "document_ids"),
    "fractional documents": ({"document_ids": torch.zeros(2, 5)}, "document_ids"),
    "negative dropout": ({"dropout": -0.1}, "dropout"),
    "dropout of one": ({"dropout": 1.0}, "dropout"),
    "dropout over one": ({"dropout": 1.5}, "dropout"),
    "dropout not a number": ({"dropout": math.nan}, "dropout"),
    "zero query buckets": ({"q_bucket_size": 0}, "q_bucket_size"),
    "negative query buckets": ({"q_bucket_size": -4}, "q_bucket_size"),
    "zero key buckets": ({"k_bucket_size": 0}, "k_bucket_size"),
    "fractional key buckets": ({"k_bucket_size": 1.5}, "k_bucket_size"),
    "unknown backend": ({"backend": "cudnn"}, "backend"),
}


@pytest.mark.parametrize("backend", ["naive", "tiled", "fused", "auto"])
@pytest.mark.parametrize("name", WRONG)
def test_functional(name, backend):
    wrong, word = WRONG[name]
    kwargs = qkv() | {"backend": backend} | wrong
    with pytest.raises(REFUSAL, match=rf"\b{word}\b"):
        dot_product_attention(kwargs.pop("q"), kwargs.pop("k"), kwargs.pop("v"), **kwargs)


def test_documents_need_as_many_queries_as_keys_have_them():
    """document_ids is (b, n) and speaks of the keys too: with other keys than the queries' own it has no meaning."""
    same = qkv(n=6, m=6)
    dot_product_attention(*same.values(), document_ids=torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(REFUSAL, match="document_ids"):
        dot_product_attention(*qkv().values(), document_ids=torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["naive", "tiled", "auto"])
def test_a_module_bias_of_wrong_shape(backend):
    with pytest.raises(REFUSAL, match="bias"):
        dot_product_attention(*qkv().values(), attn_bias=lambda i, j: zeros(3, len(i), len(j)), backend=backend)


@pytest.mark.parametrize("backend", ["naive", "tiled", "auto", "onednn"])
@pytest.mark.parametrize("heads", [3, 8])
def test_a_bias_module_of_other_heads(backend, heads):
    """Also one that is asked for some of its heads alone, whose first ones would pass for all."""
    with pytest.raises(ValueError, match="attn_bias module's output"):
        dot_product_attention(*qkv().values(), attn_bias=AlibiBias(heads), backend=backend)


@pytest.mark.parametrize("backend", ["naive", "tiled", "auto"])
def test_a_bias_module_that_draws_is_refused(backend):
    """Tiles would have draws of their own, and others in backward."""
    bias = torch.nn.Sequential(AlibiBias(4), torch.nn.Dropout(0.5))
    bias.forward = lambda i, j: bias[1](bias[0](i, j))
    with pytest.raises(ValueError, match=r"attn_bias: expected a module that computes the same.*dropout in training"):
        dot_product_attention(*qkv().values(), attn_bias=bias, backend=backend)
    dot_product_attention(*qkv().values(), attn_bias=bias.eval(), backend=backend)


def test_messages_say_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match=r"(?s)mask.*7"):
        dot_product_attention(*qkv().values(), mask=torch.ones(2, 7) > 0)
    with pytest.raises(ValueError, match=r"(?s)backend.*tiled.*cudnn"):
        dot_product_attention(*qkv().values(), backend="cudnn")
    with pytest.raises(ValueError, match=r"(?s)dropout.*1\.5"):
        dot_product_attention(*qkv().values(), dropout=1.5)


CANNOT_BE_FUSED = {
    "dropout": {"dropout": 0.1},
    "bias gradient": {"attn_bias": torch.zeros(1, 4, 5, 6, requires_grad=True)},
    "module bias": {"attn_bias": RelativePositionBias(4)},
}


@pytest.mark.parametrize("name", CANNOT_BE_FUSED)
def test_a_backend_that_cannot_serve_says_so_and_auto_says_why(name):
    """No fused kernel on a CPU does these in linear memory: the explicit choice raises, auto goes elsewhere."""
    kwargs = CANNOT_BE_FUSED[name]
    q, k, v = qkv().values()
    q.requires_grad_()
    with pytest.raises(REFUSAL, match=r"fused.*(bias|dropout)"):
        dot_product_attention(q, k, v, backend="fused", **kwargs)
    choice = select_backend(q, k, v, **kwargs)
    assert choice.name != "fused"
    assert choice.ruled_out["fused"]
    dot_product_attention(q, k, v, **kwargs).sum().backward()


def test_select_backend_refuses_the_same_mistakes():
    q, k, v = qkv().values()
    with pytest.raises(REFUSAL, match="mask"):
        select_backend(q, k, v, mask=torch.ones(2, 7) > 0)
    with pytest.raises(REFUSAL, match="head"):
        select_backend(q, k[:, :1].repeat(1, 3, 1, 1), v[:, :1].repeat(1, 3, 1, 1))


LAYER = {"dim": 16, "heads": 4, "dim_head": 4}
WRONG_LAYERS = {
    "no heads": ({"heads": 0}, "heads"),
    "negative head width": ({"dim_head": -1}, "dim_head"),
    "key heads that do not divide": ({"kv_heads": 3}, "kv_heads"),
    "no key heads": ({"kv_heads": 0}, "kv_heads"),
    "dropout of one": ({"dropout": 1.0}, "dropout"),
    "negative dropout": ({"dropout": -0.5}, "dropout"),
    "zero query buckets": ({"q_bucket_size": 0}, "q_bucket_size"),
    "negative key buckets": ({"k_bucket_size": -1}, "k_bucket_size"),
    "unknown backend": ({"backend": "best"}, "backend"),
    "negative window": ({"window": -2}, "window"),
    "head groups that do not divide": ({"head_chunks": 3}, "head_chunks"),
    "no head groups": ({"head_chunks": 0}, "head_chunks"),
}


@pytest.mark.parametrize("kind", [Attention, FlashAttention])
@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_layers_refuse_when_built(name, kind):
    wrong, word = WRONG_LAYERS[name]
    with pytest.raises(REFUSAL, match=word):
        kind(**LAYER | wrong)


@pytest.mark.parametrize("kind", [Attention, FlashAttention])
def test_layers_refuse_wrong_inputs(kind):
    layer = kind(**LAYER)
    x = torch.zeros(2, 5, 16)
    for wrong, word in (
        ({"x": torch.zeros(2, 5, 15)}, "^x: expected"),
        ({"x": torch.zeros(5, 16)}, "^x: expected"),
        ({"x": x, "context": torch.zeros(2, 5, 15)}, "context"),
        ({"x": x, "context": torch.zeros(3, 5, 16)}, "context"),
        ({"x": x, "mask": torch.ones(2, 6) > 0}, "mask"),
        ({"x": x, "attn_bias": torch.zeros(4, 5, 6)}, "attn_bias"),
        ({"x": x, "q_bucket_size": 0}, "q_bucket_size"),
        ({"x": x, "k_bucket_size": -3}, "k_bucket_size"),
    ):
        with pytest.raises(REFUSAL, match=word):
            layer(**wrong)


@pytest.mark.parametrize(("wrong", "word"), [({"dropout": 1.0}, "dropout"), ({"heads": 0}, "heads")], ids=str)
def test_cosine_refuses(wrong, word):
    with pytest.raises(REFUSAL, match=word):
        CosineSimAttention(**LAYER | {"seq_len": 8} | wrong)


@pytest.mark.parametrize(("args", "kwargs", "word"), [((16,), {"chunks": 0}, "chunks"), ((0,), {}, "dim")], ids=str)
def test_feed_forward_refuses(args, kwargs, word):
    with pytest.raises(REFUSAL, match=word):
        FeedForward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"chunks": 0}, "chunks"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"chunks": 2, "chunk_size": 2}, "chunk"),
        ({}, "chunk"),
    ],
    ids=str,
)
def test_chunked_refuses(kwargs, word):
    with pytest.raises(REFUSAL, match=word):
        Chunked(nn.Linear(4, 4), **kwargs)


def test_reversible_refuses():
    block = [nn.Linear(4, 4), nn.Linear(4, 4)]
    with pytest.raises(REFUSAL, match="grid"):
        ReversibleSequence([block], exact=True, grid=0.1)
    with pytest.raises(REFUSAL, match="grid"):
        ReversibleSequence([block], exact=True, grid=-0.5)
    with pytest.raises(REFUSAL, match="args_route"):
        ReversibleSequence([block], args_route={"mask": ()})
    with pytest.raises(REFUSAL, match=r"block|pair"):
        ReversibleSequence([[nn.Linear(4, 4)]])


SMALL = {"num_tokens": 11, "max_seq_len": 8, "dim": 16, "depth": 1, "heads": 2, "dim_head": 4}
WRONG_TRANSFORMERS = {
    "no tokens": ({"num_tokens": 0}, "num_tokens"),
    "no length": ({"max_seq_len": 0}, "max_seq_len"),
    "no width": ({"dim": 0}, "dim"),
    "negative depth": ({"depth": -1}, "depth"),
    "unknown positions": ({"positions": "sinusoidal"}, "positions"),
    "dropout of one": ({"dropout": 1.0}, "dropout"),
    "key heads that do not divide": ({"kv_heads": 3}, "kv_heads"),
    "no chunks": ({"ff_chunks": 0}, "chunks"),
    "no loss chunk": ({"loss_chunk_size": 0}, "chunk_size"),
}


@pytest.mark.parametrize("name", WRONG_TRANSFORMERS)
def test_transformer_refuses_when_built(name):
    wrong, word = WRONG_TRANSFORMERS[name]
    with pytest.raises(REFUSAL, match=word):
        Transformer(**SMALL | wrong)


def test_transformer_refuses_an_unknown_argument():
    with pytest.raises((TypeError, ValueError), match="nonsense"):
        Transformer(**SMALL, nonsense=1)


def test_transformer_refuses_wrong_inputs():
    model = Transformer(**SMALL)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    for wrong, word in (
        ({"x": torch.zeros(2, 9, dtype=torch.int64)}, "max_seq_len"),
        ({"x": torch.zeros(5, dtype=torch.int64)}, "^x: expected"),
        ({"x": torch.zeros(2, 5)}, "^x: expected"),
        ({"x": tokens, "labels": torch.zeros(2, 4, dtype=torch.int64)}, "labels"),
        ({"x": tokens, "mask": torch.ones(2, 4) > 0}, "mask"),
        ({"x": tokens, "mask": torch.ones(2, 5)}, "mask"),
    ):
        with pytest.raises(REFUSAL, match=word):
            model(**wrong)


def test_upstream_classes_are_keyword_only_but_for_two():
    for kind in (Attention, FlashAttention, CosineSimAttention, Transformer):
        with pytest.raises(TypeError):
            kind(16)
    assert isinstance(PreNorm(16, FeedForward(16, 2, 1)), nn.Module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_documents_of_the_right_shape_that_are_no_integers(dtype):
    with pytest.raises(ValueError, match="document_ids: expected an integer dtype"):
        dot_product_attention(**qkv(), document_ids=torch.zeros(2, 6, dtype=dtype))


def test_documents_of_another_batch_alone():
    for batch in (1, 3):
        with pytest.raises(ValueError, match="document_ids: expected shape"):
            dot_product_attention(**qkv(), document_ids=torch.zeros(batch, 6, dtype=torch.int64))


@pytest.mark.parametrize("window", [True, (True, 0), (0, False)])
def test_a_window_of_booleans(window):
    with pytest.raises(ValueError, match="window: expected"):
        dot_product_attention(**qkv(), window=window)
