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
    "chunked": (hf.chunked_causal_mask_function(4, torch.tensor([3, 0])), {"mask"}),
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
