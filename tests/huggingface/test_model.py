"""Our Transformer behind transformers' interface computes what it computes by itself."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache

from memory_efficient_attention_pytorch import AutoregressiveWrapper
from memory_efficient_attention_pytorch.common.divided import within
from memory_efficient_attention_pytorch.huggingface import (
    MemoryEfficientConfig,
    MemoryEfficientForCausalLM,
    make_memory_efficient,
)
from memory_efficient_attention_pytorch.models.config import KNOBS, TransformerConfig

from .ours import KINDS, model_of, prompts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_the_configuration_has_the_fields_and_defaults_of_ours():
    config = MemoryEfficientConfig()
    for name in KNOBS:
        if hasattr(TransformerConfig, name) and name != "causal":
            assert getattr(config, name) == getattr(TransformerConfig, name)
    assert config.transformer_keywords().keys() == KNOBS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_from_a_directory(kind, tmp_path):
    model, (ids, _) = model_of(kind), prompts()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MemoryEfficientForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.transformer_keywords() == model.config.transformer_keywords()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_our_own(kind):
    model, (ids, mask) = model_of(kind), prompts()
    own = AutoregressiveWrapper(model.net).generate(ids, 12, temperature=0.0, mask=mask.bool())
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    found = model.generate(ids, **options)
    assert torch.equal(found[:, 9:], own)
    assert torch.equal(model.generate(ids, use_cache=False, **options), found)
    alone = model.generate(ids[:1, 4:], max_new_tokens=12, do_sample=False)
    assert torch.equal(alone[:, 5:], own[:1])


@pytest.mark.parametrize("options", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}])
def test_beams_and_sampling_do_not_depend_on_the_cache(options):
    model, (ids, mask) = model_of("rotary, grouped, tied"), prompts()

    def generated(use_cache):
        torch.manual_seed(2)
        return model.generate(ids, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, **options)

    assert torch.equal(generated(True), generated(False))


def test_the_loss_is_that_of_shifted_labels():
    model, (ids, mask) = model_of("learned"), prompts()
    labels = ids.masked_fill(mask == 0, -100)
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    found = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(found, expected)
    count = (labels[:, 1:] != -100).sum()
    halved = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(halved, expected / 2)


def test_divided_tokens_are_refused():
    ids, _ = prompts()
    with within(object()), pytest.raises(NotImplementedError, match="tokens divided over processes"):
        model_of("learned")(ids, labels=ids)


def test_positions_of_packed_sequences_are_refused():
    with pytest.raises(ValueError, match="position_ids"):
        model_of("rotary, grouped, tied")(prompts()[0], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))


def test_a_trainer_trains_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, (ids, _) = model_of("learned"), prompts(8)
    before = model(ids, labels=ids).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    assert model.eval()(ids, labels=ids).loss.item() < before - 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_its_vocabulary_is_resized_and_saved(kind, tmp_path):
    model, (ids, _) = model_of(kind), prompts()
    before = model(ids).logits
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert loaded.config.vocab_size == 70
    torch.testing.assert_close(model(ids).logits[..., :61], before)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.isfinite(loaded(ids + 60 * (ids == 3), labels=ids).loss)


def test_weights_that_a_file_lacks_are_initialised(tmp_path):
    from safetensors.torch import load_file, save_file

    model_of("rotary, grouped, tied").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lacking = [name for name in weights if "layers.1" in name]
    save_file({n: w for n, w in weights.items() if n not in lacking}, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert lacking
    for name in lacking:
        assert loaded[name].abs().max() < 2  # memory as it was found would hold anything
        assert (loaded[name].std() > 0) == (weights[name].std() > 0)


def test_a_cache_is_continued_by_any_number_of_tokens():
    model, (ids, _) = model_of("rotary, grouped, tied"), prompts()
    with torch.no_grad():
        cache, expected = DynamicCache(), model(ids).logits
        parts = [model(piece, past_key_values=cache).logits for piece in ids.split([5, 3, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_padding_on_either_side_changes_no_token():
    model, (ids, mask) = model_of("learned"), prompts()
    left, right = model(ids, attention_mask=mask).logits, model(ids, attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(left[:1, 4:], model(ids[:1, 4:]).logits)
    torch.testing.assert_close(right[:1, :5], model(ids[:1, :5]).logits)


def test_an_assistant_changes_nothing():
    model, assistant, (ids, _) = model_of("learned"), model_of("alibi with a window"), prompts()
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(ids[:1], assistant_model=assistant, **options), model.generate(ids[:1], **options)
    )


def test_copies_dtypes_and_tuples_are_those_of_any_model(tmp_path):
    model, (ids, _) = model_of("rotary, grouped, tied"), prompts()
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded(ids).logits.dtype == torch.bfloat16
    made = AutoModelForCausalLM.from_config(model.config)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_what_it_does_not_give_is_refused():
    model, (ids, _) = model_of("learned"), prompts()
    with pytest.raises(ValueError, match=r"attention_mask: expected \(b, tokens\).*9, 9"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="checkpointing"):
        model.gradient_checkpointing_enable()
    report = make_memory_efficient(model)
    assert (report.changed, report.left) == ([], [("model", "it is memory-efficient by itself")])
