"""What layers refuse, keep and sum, each in a case of its own."""

import copy

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import (
    Attention,
    FeedForward,
    KVCache,
    MaskFunction,
    RelativePositionBias,
    ReversibleSequence,
    RotaryEmbedding,
)
from memory_efficient_attention_pytorch.attention.decision import OneDnn, Products


def test_head_groups_of_a_mask_function_of_some_heads():

    def function(b, h, i, j):
        return i - j <= 3 * h

    net, x = Attention(dim=16, heads=2, dim_head=8, head_chunks=2), torch.randn(1, 20, 16)
    heads, at = torch.arange(2, 4)[:, None, None], torch.arange(20)
    truth = net(x, mask=(at[:, None] - at <= 3 * heads)[None])
    torch.testing.assert_close(net(x, mask=MaskFunction(function, first_head=2)), truth)


def test_values_of_another_kind_than_before_are_refused():

    k = torch.zeros(3, 2, 1, 4)
    for v in (torch.zeros(3, 2, 1, 1), k.double(), k.bfloat16()):
        cache, layer = KVCache(), nn.Identity()
        with torch.no_grad():
            cache.extend(layer, k, k)
            cache.advance(1)
            with pytest.raises(ValueError, match="cache: expected batch, heads"):
                cache.extend(layer, k, v)


@torch.no_grad()
def test_documents_of_keys_that_a_cache_has_dropped():

    layer = Attention(dim=16, heads=2, dim_head=8, causal=True, window=(5, 0)).double()
    x, ids, cache = torch.randn(2, 30, 16).double(), (torch.arange(30) // 7).expand(2, 30), KVCache()
    found = []
    for end in range(1, 31):
        found.append(layer(x[:, end - 1 : end], cache=cache, document_ids=ids[:, :end]))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(found, 1), layer(x, document_ids=ids))


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


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"num_buckets": 2}, "num_buckets"),
        ({"num_buckets": 1, "bidirectional": False}, "num_buckets"),
        ({"num_buckets": 32, "max_distance": 8}, "max_distance"),
    ],
    ids=str,
)
def test_buckets_that_leave_nothing_for_the_logarithm(kwargs, word):

    with pytest.raises(ValueError, match=f"^{word}: expected"):
        RelativePositionBias(2, **kwargs)


@torch.no_grad()
def test_a_context_goes_with_neither_rotary_nor_cache():

    layer, x = Attention(dim=16, heads=2, dim_head=8), torch.randn(1, 5, 16)
    for wrong in ({"cache": KVCache()}, {"rotary": RotaryEmbedding(8)(torch.arange(5))}):
        with pytest.raises(ValueError, match="context: expected none beside rotary or cache"):
            layer(x, context=x, **wrong)


def test_a_feed_forward_whose_first_layer_has_no_bias():

    net, x = FeedForward(8, 3, chunks=4), torch.randn(2, 13, 8)
    net.net[0] = nn.Linear(8, 24, bias=False)
    torch.testing.assert_close(net(x), net.net(x))


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
