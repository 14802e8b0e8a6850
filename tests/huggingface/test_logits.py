"""Logits of a changed model are made when they are touched, and are those of the forward pass that they came from."""

import copy
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import make_memory_efficient
from memory_efficient_attention_pytorch.huggingface.logits import LazyLogits
from memory_efficient_attention_pytorch.torch_internals.capabilities import taken_away

from .models import small_model, tokens
from .steps import assert_same_step, step

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("chunks_of_a_few_tokens"),
]


def test_logits_exist_only_when_touched():
    model, ids = small_model("Gemma2"), tokens()
    expected = model(input_ids=ids, labels=ids).logits
    make_memory_efficient(model)
    logits = model(input_ids=ids, labels=ids).logits
    assert isinstance(logits, LazyLogits)
    assert logits._made is None
    assert (logits.shape, logits.dtype, logits.device) == (expected.shape, expected.dtype, expected.device)
    assert logits.float()._made is None
    assert logits._made is None
    torch.testing.assert_close(logits.float().materialize(), expected.float())
    torch.testing.assert_close(torch.softmax(logits, -1), expected.softmax(-1))
    torch.testing.assert_close(logits[:, -1] + 1, expected[:, -1] + 1)
    assert isinstance(model(input_ids=ids).logits, torch.Tensor)


def test_logits_have_the_gradients_of_the_forward_pass_that_made_them():
    model, ids = small_model("Gemma2"), tokens()

    def step():
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        with torch.no_grad():
            first = output.logits[0, 0, 0].item()
        (output.loss + first + output.logits.square().mean()).backward()
        return first, [p.grad.clone() for p in model.parameters()]

    expected = step()
    make_memory_efficient(model)
    torch.testing.assert_close(step(), expected, rtol=1e-6, atol=1e-6)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            output = model(input_ids=ids, labels=ids)
        assert isinstance(output.logits, torch.Tensor)  # as Trainer asks
        assert not output.logits.float().sum().requires_grad
        assert not output.logits.sum().requires_grad


class _Itself(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.relu(x)


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_code_that_asks_for_tensors_by_isinstance_gets_the_logits_of_an_evaluation():
    """PyTorch's own as well, which reads a tensor's memory from whatever passes for one."""
    model, ids = small_model("Llama"), tokens()
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).logits
        make_memory_efficient(model)
        uses = (
            *(torch.tensor, torch.as_tensor, torch.asarray, expected.new_tensor, copy.copy, copy.deepcopy),
            lambda logits: pickle.loads(pickle.dumps(logits)),
            lambda logits: torch.vmap(torch.clone)(logits),
            lambda logits: torch.from_dlpack(logits),
        )
        for use in uses:
            logits = model(input_ids=ids, labels=ids).logits
            assert logits._made is None
            torch.testing.assert_close(use(logits) + 0, expected)
        torch.testing.assert_close(_Itself.apply(model(input_ids=ids, labels=ids).logits), expected.relu())
        with taken_away("without_contents"):
            assert type(model(input_ids=ids, labels=ids).logits) is torch.Tensor


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Granite"])
def test_mixed_precision_makes_no_logits(kind):
    """accelerate converts what a model returns to fp32, at each step."""
    from accelerate.utils import convert_outputs_to_fp32

    model, ids = small_model(kind, torch.float32), tokens()
    called = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(lambda: model(input_ids=ids, labels=ids)))
    expected = called()
    make_memory_efficient(model)
    found = called()
    assert type(found.logits) is LazyLogits
    assert found.logits._made is None
    assert found.logits.dtype == expected.logits.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.logits.materialize(), expected.logits, rtol=2e-2, atol=2e-2)


def test_the_loss_takes_the_arguments_of_the_library():
    model, ids = small_model("Llama"), tokens()
    shifted = ids.roll(-1, 1).masked_fill(ids > 50, -7)
    cases = (
        {"num_items_in_batch": torch.tensor(17)},
        {"shift_labels": shifted, "ignore_index": -7},
        {"num_items_in_batch": 5, "ignore_index": 4},
    )
    expected = [step(model, ids, labels=ids, **case) for case in cases]
    make_memory_efficient(model, checkpoint=False)
    for case, step_before in zip(cases, expected, strict=True):
        assert_same_step(step(model, ids, labels=ids, **case), step_before, 1e-6)


def test_labels_are_taken_by_position():
    model, ids = small_model("Llama"), tokens()
    expected = model(ids, labels=ids).loss
    make_memory_efficient(model)
    output = model(ids, None, None, None, None, ids)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert output.logits._made is None


def test_logits_that_a_model_makes_contiguous_stay_lazy():
    import transformers

    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    model, ids = transformers.OPTForCausalLM(config).train(), tokens()
    expected = step(model, ids, labels=ids)
    make_memory_efficient(model)
    assert_same_step(step(model, ids, labels=ids), expected, 2e-5)
    logits = model(input_ids=ids, labels=ids).logits
    assert logits._made is None


@pytest.mark.parametrize(
    "of",
    [
        lambda x: x // 2,
        lambda x: 2 // x,
        lambda x: x % 2,
        lambda x: 2 % x,
        lambda x: +x,
        lambda x: torch.tensor(100.0 in x),
        lambda x: np.array(x.detach(), copy=True)[0].sum(),
        lambda x: torch.stack(list(reversed(x))),
    ],
)
def test_any_operator_makes_logits(of):
    model, ids = small_model("Llama"), tokens()
    expected = of(model(input_ids=ids, labels=ids).logits)
    make_memory_efficient(model)
    torch.testing.assert_close(of(model(input_ids=ids, labels=ids).logits), expected, check_dtype=False)
