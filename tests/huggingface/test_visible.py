"""What stands for a mask in a model is used as the mask would be, and is one where a model wants one."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from accelerate.utils import send_to_device
from transformers import masking_utils as hf

from memory_efficient_attention_pytorch import dot_product_attention
from memory_efficient_attention_pytorch.huggingface.attention import memory_efficient_attention
from memory_efficient_attention_pytorch.huggingface.visibility import memory_efficient_mask
from memory_efficient_attention_pytorch.huggingface.visible import evaluated_on

from .test_visibility import MASKS, PADDING, attend, heads


def both(name, padding=None, queries=12, keys=12):
    """What stands for the mask, and the mask."""
    sizes = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": keys - queries}
    given = {**sizes, "mask_function": MASKS[name][0], "attention_mask": padding}
    return memory_efficient_mask(**given), hf.sdpa_mask(**given, allow_is_causal_skip=False)


def reads():
    return pytest.warns(UserWarning, match="the model itself reads its mask, which is made as a tensor")


def made(visible):
    return visible._made is not None


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("queries", [12, 4])
@pytest.mark.parametrize("name", MASKS)
def test_a_model_that_reads_it_reads_the_mask(name, queries, padding):
    visible, mask = both(name, padding, queries)
    assert (visible.shape, visible.dtype, visible.ndim) == (mask.shape, mask.dtype, mask.ndim)
    assert (visible.size(), visible.size(-1), visible.dim(), visible.numel()) == (mask.shape, 12, 4, mask.numel())
    assert not made(visible)
    with reads() as told:
        assert visible[:, 0].equal(mask[:, 0])
    assert [warning.filename for warning in told] == [__file__], "the model's own line, once"
    assert torch.where(visible, 1.0, 2.0).equal(torch.where(mask, 1.0, 2.0))
    assert visible[..., :5].equal(mask[..., :5])
    assert (~visible).equal(~mask)
    assert not (visible & ~mask).any()
    assert (mask == visible).all()
    assert (visible != mask).sum() == 0
    assert torch.stack(list(visible)).equal(mask)
    assert visible.to(torch.float64).equal(mask.to(torch.float64))
    assert visible.sum() == mask.sum()
    assert visible.arguments.keys() == both(name, padding, queries)[0].arguments.keys()


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
    assert not made(visible)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (kept & True).equal(shown)
        assert visible[:, :, 2:7, :].equal(mask[:, :, 2:7, :]), "others are a tensor"


SUMS = {
    "left": lambda scores, mask: scores + mask,
    "right": lambda scores, mask: mask + scores,
    "function": torch.add,
    "keyword": lambda scores, mask: torch.add(scores, other=mask),
    "in place": lambda scores, mask: scores.add_(mask),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["causal", "sliding", "blocks"])
@pytest.mark.parametrize("spelt", SUMS)
def test_in_a_sum_it_hides_scores(spelt, name, padding, dtype):
    """As transformers' masks of floating point do, which models' own attention adds."""
    visible, mask = both(name, padding)
    for shape in ((1, 2, 12, 12), (12,)) if spelt != "in place" else ((2, 2, 12, 12),):
        scores = torch.randn(shape).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = SUMS[spelt](scores.clone(), visible)
        assert found.dtype == dtype
        seen = mask.any(-1, keepdim=True)
        expected = (
            (scores / (1 + (spelt == "twice")))
            .expand_as(found)
            .masked_fill(~mask, float("-inf"))
            .softmax(-1)
            .nan_to_num()
        )
        torch.testing.assert_close(found.softmax(-1) * seen, expected * seen)


@pytest.mark.parametrize("inference", [False, True])
def test_one_that_a_model_changes_is_seen_so_by_attention(inference):
    visible, mask = both("causal")
    with reads(), torch.inference_mode(inference):
        visible[:, :, :, 0] = False
    mask = mask.clone()
    mask[:, :, :, 0] = False
    q, k, v = heads(12, 12)
    expected = dot_product_attention(q, k, v, mask=mask, backend="naive")
    torch.testing.assert_close(attend(q, k, v, visible), expected)
    torch.testing.assert_close(attend(q[:, :, -3:], k, v, visible[:, :, -3:, :]), expected[:, :, -3:])


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["bidirectional", "prefix"])
def test_one_for_a_single_query_is_for_all(name, padding):
    """As a tensor it would broadcast, which BridgeTower relies on."""
    visible, mask = both(name, padding, queries=1)
    q, k, v = heads(7, 12)
    found, _ = memory_efficient_attention(torch.nn.Module(), q, k, v, visible)
    expected = dot_product_attention(q, k, v, mask=mask.expand(-1, -1, 7, -1), backend="naive")
    torch.testing.assert_close(found.transpose(1, 2), expected)


@pytest.mark.parametrize("name", ["causal", "chunked", "blocks"])
def test_it_moves_to_the_device_of_the_next_module_once(name):
    """As accelerate has it for a model on several devices."""
    visible, _ = both(name, PADDING)
    moved = send_to_device({"attention_mask": visible}, torch.device("meta"))["attention_mask"]
    assert moved.device.type == "meta"
    assert all(x.is_meta for x in moved.arguments.values() if isinstance(x, torch.Tensor))
    assert visible.to("meta") is moved
    assert visible.to("cpu", non_blocking=True) is visible
    assert not made(visible)


def test_a_function_goes_on_computing_where_its_tensors_are():
    def on_meta(*indices):
        assert all(index.is_meta for index in indices)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)  # by which this test gets it back

    index = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    assert evaluated_on(torch.device("meta"), on_meta)(index, index, index, index).device.type == "cpu"


def test_it_is_copied_and_compared_without_a_tensor():
    visible, _ = both("causal")
    assert copy.deepcopy(visible).arguments == visible.arguments
    assert visible != "paged"
    assert visible is not None and visible != None  # noqa: E711, PT018  as models are written
    assert not hasattr(visible, "get_seq_length")
    assert len({visible, visible}) == 1
    assert not made(visible)
