"""What stands for a mask in a model is used as the mask would be, and is one where a model wants one."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from accelerate.utils import send_to_device
from transformers import masking_utils as hf

from memory_efficient_attention_pytorch import dot_product_attention
from memory_efficient_attention_pytorch.huggingface.visibility import memory_efficient_mask

from .test_visibility import MASKS, PADDING, attend, heads

READS = pytest.warns(UserWarning, match="the model itself reads its mask")


def both(name, padding, queries=12, keys=12):
    """What stands for the mask, and the mask."""
    sizes = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": keys - queries}
    given = {**sizes, "mask_function": MASKS[name][0], "attention_mask": padding}
    return memory_efficient_mask(**given), hf.sdpa_mask(**given, allow_is_causal_skip=False)


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("queries", [12, 4])
@pytest.mark.parametrize("name", MASKS)
def test_a_model_that_reads_it_reads_the_mask(name, queries, padding):
    visible, mask = both(name, padding, queries)
    assert (visible.shape, visible.dtype, visible.ndim) == (mask.shape, mask.dtype, mask.ndim)
    with READS:
        assert visible.tensor.equal(mask)
    assert torch.where(visible, 1.0, 2.0).equal(torch.where(mask, 1.0, 2.0))
    assert visible[:, 0].equal(mask[:, 0])
    assert visible[..., :5].equal(mask[..., :5])
    assert (~visible).equal(~mask)
    assert (visible & ~mask).sum() == 0
    assert (mask == visible).all()
    assert visible.to(torch.float64).equal(mask.to(torch.float64))
    assert visible.sum() == mask.sum()


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("last", [1, 5, 12, 100])
@pytest.mark.parametrize("name", MASKS)
def test_the_last_queries_are_kept_without_a_tensor(name, last, padding):
    """As where only those are computed whose logits are wanted (Gemma 4)."""
    visible, mask = both(name, padding)
    kept, shown = visible[:, :, slice(-last, None), :], mask[:, :, -last:]
    assert (kept is visible) == (last >= 12)
    q, k, v = heads(shown.shape[2], 12)
    torch.testing.assert_close(attend(q, k, v, kept), dot_product_attention(q, k, v, mask=shown, backend="naive"))
    assert "tensor" not in vars(visible)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert kept.tensor.equal(shown)


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["causal", "sliding", "blocks"])
def test_a_bias_that_is_added_is_one_of_attention(name, padding):
    visible, mask = both(name, padding)
    bias = torch.randn(1, 2, 12, 12, dtype=torch.float64)
    hidden = bias.masked_fill(~mask, float("-inf"))
    for biased in (visible + bias, bias + visible, bias / 2 + (visible + bias / 2), torch.add(bias, visible)):
        assert biased.dtype == torch.float64
        for kept, last in ((biased, 12), (biased[:, :, -3:, :], 3)):
            q, k, v = heads(last, 12)
            expected = dot_product_attention(q, k, v, attn_bias=hidden[:, :, -last:], backend="naive")
            torch.testing.assert_close(attend(q, k, v, kept), expected)
    with READS:
        softmax = torch.softmax(biased, -1)
    seen = mask.any(-1, keepdim=True)
    torch.testing.assert_close(softmax * seen, hidden.softmax(-1).nan_to_num() * seen)


@pytest.mark.parametrize("name", ["causal", "chunked", "blocks"])
def test_it_moves_to_the_device_of_the_next_module(name):
    """As accelerate has it for a model on several devices; a function goes on computing where its tensors are."""
    visible, mask = both(name, PADDING)
    moved = send_to_device({"attention_mask": visible}, torch.device("meta"))["attention_mask"]
    assert moved.device.type == "meta"
    assert all(x.is_meta for x in moved.arguments.values() if isinstance(x, torch.Tensor))
    with READS:
        assert visible.to("cpu", non_blocking=True).tensor.equal(mask)


def test_it_is_copied_without_a_tensor_and_has_no_attributes_that_tensors_lack():
    visible, _ = both("causal", None)
    assert copy.deepcopy(visible).arguments == visible.arguments
    assert not hasattr(visible, "get_seq_length")
    assert "tensor" not in vars(visible)
