"""transformers' masks are the same functions of indices here, told apart where attention has an argument for them."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import masking_utils as hf

from memory_efficient_attention_pytorch import dot_product_attention
from memory_efficient_attention_pytorch.huggingface.visibility import memory_efficient_mask

PADDING = torch.tensor([[0, 0, 0] + [1] * 9, [1] * 10 + [0, 0]]).bool()
PACKED = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3]).expand(2, -1)
POSITIONS = torch.tensor([[*range(5), *range(4), *range(3)]]).expand(2, -1)
BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1, -1]]).expand(2, -1)
MASKS = {
    "causal": (hf.causal_mask_function, {"causal"}),
    "bidirectional": (hf.bidirectional_mask_function, set()),
    "sliding": (hf.sliding_window_causal_mask_function(4), {"causal", "window"}),
    "sliding both ways": (hf.sliding_window_bidirectional_mask_function(3), {"window"}),
    "packed": (
        hf.packed_sequence_compatibility_function(hf.causal_mask_function, POSITIONS, PACKED),
        {"causal", "document_ids"},
    ),
    "packed and sliding": (
        hf.packed_sequence_compatibility_function(hf.sliding_window_causal_mask_function(3), POSITIONS, PACKED),
        {"causal", "window", "document_ids"},
    ),
    "chunked": (hf.chunked_causal_mask_function(4, torch.tensor([3, 0])), {"causal", "document_ids"}),
    "blocks": (hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(BLOCKS)), {"mask"}),
    "prefix": (hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: k < 5), {"mask"}),
}


def attend(q, k, v, visible):
    return dot_product_attention(q, k, v, q_bucket_size=5, k_bucket_size=3, **visible.arguments)


def heads(n, m):
    torch.manual_seed(0)
    return [torch.randn(2, 2, length, 4, dtype=torch.float64) for length in (n, m, m)]


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("sizes", [(12, 12, 0, 0), (4, 12, 8, 0), (3, 12, 5, 0), (3, 6, 9, 6)])
@pytest.mark.parametrize("name", MASKS)
def test_attention_sees_what_the_mask_of_the_library_shows(name, sizes, padding):
    queries, keys, q_offset, kv_offset = sizes
    function, arguments = MASKS[name]
    sizes = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset}
    shown = hf.sdpa_mask(**sizes, mask_function=function, attention_mask=padding, allow_is_causal_skip=False)
    visible = memory_efficient_mask(**sizes, mask_function=function, attention_mask=padding)
    q, k, v = heads(queries, keys)
    torch.testing.assert_close(attend(q, k, v, visible), dot_product_attention(q, k, v, mask=shown, backend="naive"))
    if queries == keys:
        assert set(visible.arguments) == arguments | ({"mask"} if padding is not None else set())


def test_functions_written_for_numbers_are_mapped():
    """As users hand them over: indexing with a single number, which broadcasting would get wrong."""
    first = torch.tensor([3, 0])

    def function(b, h, q, k):
        return (k <= q) | (k < first[b].sum())

    sizes = {"batch_size": 2, "q_length": 12, "kv_length": 12, "use_vmap": True, "mask_function": function}
    shown = hf.sdpa_mask(**sizes, allow_is_causal_skip=False)
    q, k, v = heads(12, 12)
    found = attend(q, k, v, memory_efficient_mask(**sizes))
    torch.testing.assert_close(found, dot_product_attention(q, k, v, mask=shown, backend="naive"))


def test_padding_that_hides_nothing_is_dropped():
    visible = memory_efficient_mask(2, 12, 12, attention_mask=torch.ones(2, 12))
    assert visible.arguments == {"causal": True}


def test_one_document_alone_is_none():
    """As transformers that is traced hands it on."""
    one = torch.full((2, 12), 3)
    function = hf.packed_sequence_compatibility_function(hf.causal_mask_function, POSITIONS, one)
    assert memory_efficient_mask(2, 12, 12, mask_function=function).arguments == {"causal": True}


def prefix(b, h, q, k):
    return k < PREFIXES[b]


PREFIXES = torch.tensor([4, 7])
MAKERS = {
    "causal": (hf.create_causal_mask, {}),
    "causal and a prefix": (hf.create_causal_mask, {"or_mask_function": prefix}),
    "causal and what is also asked": (hf.create_causal_mask, {"and_mask_function": prefix}),
    "blocks seen whole": (hf.create_causal_mask, {"block_sequence_ids": BLOCKS}),
    "sliding": (hf.create_sliding_window_causal_mask, {}),
    "sliding and blocks": (hf.create_sliding_window_causal_mask, {"block_sequence_ids": BLOCKS}),
    "chunked": (hf.create_chunked_causal_mask, {}),
    "bidirectional": (hf.create_bidirectional_mask, {}),
    "sliding both ways": (hf.create_bidirectional_sliding_window_mask, {}),
}


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("name", MAKERS)
def test_masks_that_models_make_are_those_of_its_own_attention(name, cache, padding):
    """From the makers that models call, with caches that grow and of fixed size."""
    from transformers import DynamicCache, LlamaConfig, StaticCache

    from memory_efficient_attention_pytorch.huggingface.attention import NAME, register

    register()
    maker, options = MAKERS[name]
    bidirectional = "bidirectional" in maker.__name__
    if cache != "none" and (bidirectional or "block_sequence_ids" in options):
        pytest.skip("made for whole sequences")
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=8)
    config.sliding_window = config.attention_chunk_size = 4
    kind = {"sliding": "sliding_attention", "chunked": "chunked_attention"}.get(name.split()[0], "full_attention")
    config.layer_types = [kind]
    queries = 12 if cache == "none" else 5
    given = {"config": config, "inputs_embeds": torch.zeros(2, queries, 8), "attention_mask": padding, **options}
    if not bidirectional:
        held = {"none": None, "dynamic": DynamicCache, "static": lambda config: StaticCache(config, max_cache_len=15)}
        given["past_key_values"] = held[cache] and held[cache](config=config)
        if cache != "none":
            before = torch.zeros(2, 2, 7, 4)
            given["past_key_values"].update(before, before, 0)
            given["position_ids"] = torch.arange(7, 12).expand(2, -1)
    config._attn_implementation = "sdpa"
    shown = maker(**given)
    config._attn_implementation = NAME
    visible = maker(**given)
    q, k, v = heads(queries, visible.keys)
    if shown is None:  # what its attention knows by itself
        arguments = {} if bidirectional else {"causal": True}
        expected = dot_product_attention(q, k, v, backend="naive", **arguments)
    else:
        expected = dot_product_attention(q, k, v, mask=shown, backend="naive")
    seen = torch.ones(2, queries, dtype=torch.bool) if padding is None else padding[:, -queries:]
    found = attend(q, k, v, visible)
    torch.testing.assert_close(found.mT.transpose(1, 3)[seen], expected.mT.transpose(1, 3)[seen])
