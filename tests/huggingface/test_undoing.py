"""A changed model among others' hands: accelerate, Trainer, pickle, other models; and what restore brings back."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import feed_forward, make_memory_efficient, restore
from memory_efficient_attention_pytorch.huggingface.logits import LazyLogits
from memory_efficient_attention_pytorch.huggingface.visibility import NAME
from memory_efficient_attention_pytorch.recompute.host_inputs import InputsOnHost

from .models import small_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def chunks_of_a_few_tokens(monkeypatch):
    monkeypatch.setattr(feed_forward, "chunks_for", lambda x, hidden: min(3, x.shape[1]))


def test_logits_are_those_of_the_weights_that_forward_saw():
    """An optimizer that stepped meanwhile is told, and a head that was replaced is not asked."""
    model, ids = small_model("Llama", torch.float32), tokens()
    make_memory_efficient(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for read_first in (True, False):
        outputs = model(input_ids=ids, labels=ids)
        before = outputs.logits.materialize().clone() if read_first else None
        outputs.loss.backward()
        optimizer.step()
        if read_first:
            assert torch.equal(outputs.logits.materialize(), before)
        else:
            uses = (lambda x: x.argmax(-1), lambda x: torch.softmax(x / 0.7, -1), lambda x: x.float() + 1, torch.exp)
            for use in uses:
                with pytest.raises(RuntimeError, match="logits: expected to be used before the head's weight changes"):
                    use(outputs.logits)


def test_an_mlp_whose_layers_have_hooks_is_computed_whole():
    """They may look at any token."""
    model, ids = small_model("Llama"), tokens()
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    make_memory_efficient(model, checkpoint=False)
    seen.clear()
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen == [ids.shape[1]] * len(model.model.layers)


@pytest.mark.parametrize("first", ["part", "whole"])
def test_a_part_and_a_whole_are_changed_once(first):
    model = small_model("Llama")
    made, other = (model.model, model) if first == "part" else (model, model.model)
    make_memory_efficient(made)
    with pytest.raises(ValueError, match="one changed already"):
        make_memory_efficient(other)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    restore(made)


@pytest.mark.parametrize("first", [0, 1])
def test_models_that_share_a_configuration_get_it_back(first):
    one = small_model("Llama")
    other = type(one)(one.config)
    before = one.config._attn_implementation
    for model in (one, other):
        make_memory_efficient(model)
    for model in (one, other)[:: 1 - 2 * first]:
        restore(model)
    assert one.config._attn_implementation == before
    copied = type(one)(copy.deepcopy(one.config))
    make_memory_efficient(copied)


def test_a_changed_model_is_pickled_with_its_changes():
    model, ids = small_model("Llama"), tokens()
    make_memory_efficient(model, checkpoint=False)
    copied = pickle.loads(pickle.dumps(model))
    found, expected = (net(input_ids=ids, labels=ids) for net in (copied, model))
    assert type(found.logits) is LazyLogits
    torch.testing.assert_close(found.loss, expected.loss)
    assert copied.forward.module is copied
    restored = pickle.loads(pickle.dumps(found.logits))
    torch.testing.assert_close(restored, expected.logits.materialize())
    restore(copied)
    assert not vars(copied).get("forward")
    assert vars(model)["forward"].module is model


def test_what_accelerate_put_around_a_model_stays():
    from accelerate import Accelerator

    model, ids = small_model("Llama", torch.float32), tokens()
    make_memory_efficient(model)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    restore(prepared)
    seen = []
    prepared.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert prepared(input_ids=ids, labels=ids).logits.dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_what_accelerate_unwraps_is_the_changed_model():
    from accelerate import Accelerator

    model, ids = small_model("Llama", torch.float32), tokens()
    make_memory_efficient(model)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    unwrapped = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    assert type(unwrapped(input_ids=ids, labels=ids).logits) is LazyLogits
    restore(unwrapped)
    assert type(unwrapped(input_ids=ids, labels=ids).logits) is torch.Tensor


def test_hooks_on_the_embedding_are_as_before():
    model = small_model("Llama")
    embedding = model.get_input_embeddings()
    for own in (0, 1):
        if own:
            model.enable_input_require_grads()
        for _ in range(2):
            make_memory_efficient(model)
            restore(model)
            assert len(embedding._forward_hooks) == own
    model.disable_input_require_grads()
    assert not embedding._forward_hooks
    make_memory_efficient(model)
    model.enable_input_require_grads()  # by somebody else
    restore(model)
    assert len(embedding._forward_hooks) == 1
    model.disable_input_require_grads()
    assert not embedding._forward_hooks


def test_inputs_stay_on_the_host_where_checkpointing_is_turned_on_again():
    """Trainer does so, where its arguments ask for checkpoints."""
    model = small_model("Llama")
    make_memory_efficient(model, checkpoint="cpu")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    functions = {type(layer._gradient_checkpointing_func) for layer in model.model.layers}
    assert functions == {InputsOnHost}
    restore(model)
    assert not vars(model).get("gradient_checkpointing_enable")


def test_a_head_that_is_replaced_afterwards_is_told():
    model, ids = small_model("Llama"), tokens()
    make_memory_efficient(model)
    model.set_output_embeddings(torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False).double())
    with pytest.warns(UserWarning, match="its head was replaced since make_memory_efficient"):
        model(input_ids=ids, labels=ids).loss.backward()


def test_a_second_model_is_left_by_its_name():
    both = torch.nn.ModuleDict({"policy": small_model("Llama"), "reference": small_model("Gemma2")})
    report = make_memory_efficient(both)
    assert ("reference", "another model: call make_memory_efficient on it") in report.left
    assert both["reference"].config._attn_implementation != NAME
