"""Keys and values of earlier tokens: the same numbers as reading everything at once, and no more memory than said."""

import copy
import pickle

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Attention, CosineSimAttention, KVCache, RotaryEmbedding, Transformer

SHAPE = {"num_tokens": 17, "max_seq_len": 64, "dim": 16, "depth": 2, "heads": 4, "dim_head": 4, "causal": True}
VARIANTS = {
    "learned": {},
    "rotary": {"positions": "rotary"},
    "alibi": {"positions": "alibi"},
    "none": {"positions": "none"},
    "window": {"window": (5, 0)},
    "window-0": {"window": 0},
    "rotary-window": {"positions": "rotary", "window": 7},
    "alibi-window": {"positions": "alibi", "window": (3, None)},
    "grouped": {"kv_heads": 2, "positions": "rotary"},
    "multi-query-window": {"kv_heads": 1, "window": (4, 0)},
    "head-chunks": {"head_chunks": 2, "ff_chunks": 3},
    "stored-tied": {"reversible": False, "tie_embeddings": True},
    "exact": {"exact": True},
    "tiled": {"backend": "tiled"},
}


def make(**kwargs) -> Transformer:
    return Transformer(**{**SHAPE, **kwargs}).double().eval()


def in_calls(model, tokens, lengths, cache, mask=None):
    """The logits of all tokens, read in calls of these lengths."""
    assert sum(lengths) == tokens.shape[1]
    logits, begin = [], 0
    for length in lengths:
        end = begin + length
        seen = None if mask is None else mask[:, :end]
        logits.append(model(tokens[:, begin:end], mask=seen, cache=cache))
        begin = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("lengths", [[9] + [1] * 19, [1] * 28, [3, 11, 1, 1, 8, 4]], ids=["prompt", "ones", "calls"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(variant, lengths):
    model, tokens = make(**VARIANTS[variant]), torch.randint(17, (3, 28))
    cache = KVCache()
    cached = in_calls(model, tokens, lengths, cache)
    # The grid of exact mode turns a difference in the last bit into one of its step, 2**-16, now and then.
    torch.testing.assert_close(cached, model(tokens), rtol=0, atol=1e-3 if variant == "exact" else 1e-12)
    assert cache.length == 28


@pytest.mark.parametrize("variant", ["learned", "rotary", "alibi-window", "grouped"])
@torch.no_grad()
def test_padded_rows_equal_their_own_runs(variant):
    model, tokens = make(**VARIANTS[variant]), torch.randint(17, (3, 24))
    padding = [0, 4, 9]
    mask = torch.arange(24) >= torch.tensor(padding)[:, None]
    together = in_calls(model, tokens, [12, 2] + [1] * 10, KVCache(), mask)
    for row, start in enumerate(padding):
        alone = model(tokens[row : row + 1, start:])
        torch.testing.assert_close(together[row : row + 1, start:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("module", [Attention, CosineSimAttention])
@torch.no_grad()
def test_an_attention_alone(module):
    extra = {"seq_len": 20} if module is CosineSimAttention else {"kv_heads": 2}
    layer = module(dim=16, heads=4, dim_head=8, causal=True, **extra).double().eval()
    x, cache = torch.randn(2, 20, 16, dtype=torch.float64), KVCache()
    parts = []
    for part in x.split([6, 1, 1, 12], dim=1):
        parts.append(layer(part, cache=cache))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, (20, 0), (7, 0), (3, 0)])
@pytest.mark.parametrize("prompt", [1, 3, 7, 8])
@torch.no_grad()
def test_a_limit_is_a_window(prompt, window):
    """As long as a prompt fits, and then token by token, a limit of 8 sees what a window of 7 sees, if none is less."""
    model = make(positions="rotary", window=(3, 0) if window == (3, 0) else (7, 0))
    tokens, cache = torch.randint(17, (2, 40)), KVCache(limit=8)
    expected = model(tokens)
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.window = window
    limited = in_calls(model, tokens, [prompt] + [1] * (40 - prompt), cache)
    torch.testing.assert_close(limited, expected, rtol=0, atol=1e-12)


def one_layer(k, *, calls, left=None, limit=None):
    """A cache into which a layer has put ``calls`` times k, and the keys it handed out last."""
    cache, layer = KVCache(limit), nn.Identity()
    with torch.no_grad():
        for n in calls:
            keys, values = cache.extend(layer, k[:, :, :n], k[:, :, :n], left)
            cache.advance(n)
    assert keys.equal(values)
    return cache, keys


ELEMENT = 2 * 3 * 2 * 4 * 4  # keys and values of one token: b=3, kv=2, d=4, fp32


@pytest.mark.parametrize(
    ("calls", "bound", "left"),
    [
        ([1] * 100, 200, None),
        ([50] + [1] * 100, 300, None),
        ([1000], 2 * 11, 10),
        ([1000] + [1] * 50, 2 * 11, 10),
        ([1] * 1000, 2 * 11, 10),
        ([7] * 30, 2 * 17, 10),
        ([1] * 50, 2, 0),
    ],
)
def test_memory_is_at_most_twice_what_can_be_seen(calls, bound, left):
    cache, keys = one_layer(torch.randn(3, 2, 1000, 4), calls=calls, left=left)
    assert cache.nbytes <= bound * ELEMENT
    assert keys.shape[2] == min(sum(calls), (sum(calls) if left is None else left) + calls[-1])


def test_a_limited_cache_stops_growing():
    cache, keys = one_layer(torch.randn(3, 2, 100, 4), calls=[100] + [1] * 500, limit=100)
    assert cache.nbytes <= 200 * ELEMENT
    assert keys.shape[2] == 100


@torch.no_grad()
def test_keys_come_back_in_order_whatever_moves_inside():
    cache, layer, counter = KVCache(), nn.Identity(), torch.arange(200.0).view(1, 1, 200, 1)
    seen = 0
    for n in [3, 1, 1, 20, 1, 4, 1, 1, 1, 9, 1, 1, 6, 2, 1, 40, 1, 1]:
        keys, _ = cache.extend(layer, counter[:, :, seen : seen + n], counter[:, :, seen : seen + n], left=6)
        cache.advance(n)
        seen += n
        assert keys.flatten().tolist() == list(range(max(0, seen - n - 6), seen))


# Errors


def test_gradients_must_be_off():
    with pytest.raises(ValueError, match=r"cache.*no_grad"):
        make()(torch.zeros(1, 3, dtype=torch.long), cache=KVCache())


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(1, 2, 1, 4),
        torch.zeros(3, 1, 1, 4),
        torch.zeros(3, 2, 1, 1),
        torch.zeros(3, 2, 1, 4, dtype=torch.float64),
        torch.zeros(3, 2, 1, 4, device="meta"),
    ],
    ids=["batch", "heads", "width", "dtype", "device"],
)
@torch.no_grad()
def test_what_may_not_change_between_calls(other):
    cache, layer = KVCache(), nn.Identity()
    cache.extend(layer, torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 5, 4))
    cache.advance(5)
    with pytest.raises(ValueError, match="cache: expected batch, heads"):
        cache.extend(layer, other, other)


@torch.no_grad()
def test_a_pass_cut_short_is_noticed():
    """Its first layers would otherwise hold tokens that the others have never seen."""
    model, cache, tokens = make(), KVCache(), torch.randint(17, (1, 5))
    model(tokens, cache=cache)
    handle = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens[:, :1], cache=cache)
    handle.remove()
    with pytest.raises(ValueError, match=r"seen 5 tokens.*one that has seen 6"):
        model(tokens[:, :1], cache=cache)


@torch.no_grad()
def test_a_layer_used_twice_in_a_pass_is_noticed():
    cache, layer, k = KVCache(), nn.Identity(), torch.zeros(1, 1, 2, 4)
    cache.extend(layer, k, k)
    with pytest.raises(ValueError, match="by one call in each forward pass"):
        cache.extend(layer, k, k)


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="limit: expected a positive integer, got 0"):
        KVCache(limit=0)


def through_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("variant", ["learned", "rotary-window", "grouped", "head-chunks"])
@torch.no_grad()
def test_a_copy_goes_on_and_holds_no_weights(variant, copied):
    """With this model or a copy of it, several times over; the original goes its own way."""
    model, tokens = make(**VARIANTS[variant]), torch.randint(17, (3, 28))
    cache, others = KVCache(), torch.randint(17, (3, 10))
    in_calls(model, tokens[:, :18], [9, 4, 5], cache)
    twin = copied(copied(cache))
    assert (twin.length, twin.limit, twin.nbytes) == (cache.length, cache.limit, cache.nbytes)
    assert len(pickle.dumps(cache)) < cache.nbytes + 4096
    apart = in_calls(model, others, [3, 7], cache)
    for net, mine in ((model, twin), (copy.deepcopy(model), copied(twin))):
        found = in_calls(net, tokens[:, 18:], [1, 2, 7], mine)
        torch.testing.assert_close(found, model(tokens)[:, 18:], rtol=0, atol=1e-12)
    together = torch.cat((tokens[:, :18], others), dim=1)
    torch.testing.assert_close(apart, model(together)[:, 18:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_copy_of_a_pass_cut_short_is_of_no_more_use_either():
    model, cache = make(), KVCache()
    model(torch.randint(17, (1, 5)), cache=cache)
    model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randint(17, (1, 1)), cache=cache)
    twin = copy.deepcopy(cache)
    for broken in (cache, twin):
        with pytest.raises(ValueError, match="cache: expected every layer to have seen 5 tokens"):
            make()(torch.randint(17, (1, 1)), cache=broken)


def test_modes_without_gradients_may_follow_one_another():
    model, tokens = make(), torch.randint(17, (2, 12))
    with torch.no_grad():
        whole = model(tokens)
    for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        cache = KVCache()
        found = []
        for part, mode in zip(tokens.split(3, dim=1), modes * 2, strict=True):
            with mode():
                found.append(model(part, cache=cache).clone())
        torch.testing.assert_close(torch.cat(found, dim=1), whole)


@pytest.mark.parametrize("argument", ["mask", "document_ids"])
def test_what_covers_other_tokens_than_there_are_is_refused(argument):
    """A mask of the longest length that there may be, say, of which the end would be taken."""
    layer, x = Attention(dim=16, heads=2, dim_head=8, causal=True).eval(), torch.randn(1, 6, 16)
    longer = torch.zeros(1, 10, dtype=torch.bool if argument == "mask" else torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{argument}: expected a last dimension of 6, the cache's"):
        layer(x, cache=KVCache(), **{argument: longer})


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


@torch.no_grad()
def test_a_context_goes_with_neither_rotary_nor_cache():
    layer, x = Attention(dim=16, heads=2, dim_head=8), torch.randn(1, 5, 16)
    for wrong in ({"cache": KVCache()}, {"rotary": RotaryEmbedding(8)(torch.arange(5))}):
        with pytest.raises(ValueError, match="context: expected none beside rotary or cache"):
            layer(x, context=x, **wrong)
