"""What transformers asks of every model that generates, asked of our Transformer as one of its models.

Asked in ``test_model.py``: greedy generation against our own, beams and sampling without a cache, an assistant.
Not asked, since there is nothing to ask: scores of attentions and hidden states (refused), contrastive, group and
constrained search (no longer part of transformers), quantised caches and offloading (of a GPU), multimodal inputs.
"""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache, pipeline

from memory_efficient_attention_pytorch.huggingface.tokenizers import byte_tokenizer

from .models import small_model
from .ours import KINDS, model_of, prompts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 3, "do_sample": True, "top_k": 5},
}
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def generated(model, *args, **options):
    torch.manual_seed(2)
    return model.generate(*args, **GREEDY | options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_returned_by_name_is_what_is_returned_alone(kind, mode):
    model, (ids, mask) = model_of(kind), prompts()
    given = {"attention_mask": mask, **MODES[mode]}
    named = generated(model, ids, **given, **ALL)
    assert torch.equal(named.sequences, generated(model, ids, **given))
    rows = 2 * given.get("num_beams", 1)
    for each in (named.scores, named.logits):
        assert [tuple(step.shape) for step in each] == [(rows, 61)] * 8
    if mode == "greedy":
        whole = torch.cat((mask, torch.ones(2, 8, dtype=mask.dtype)), 1)
        logits = model(named.sequences, attention_mask=whole).logits[:, 8:-1]
        torch.testing.assert_close(torch.stack(named.logits, 1), logits)
    held = named.past_key_values
    assert isinstance(held, DynamicCache)
    assert held.get_seq_length() == 9 + 8 - 1
    shape = (rows, model.config.kv_heads or 4, 16, 8)
    assert [(layer.keys.shape, layer.values.shape) for layer in held.layers] == [(shape, shape)] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_fixed_size_changes_nothing(kind, mode):
    model, (ids, mask) = model_of(kind), prompts()
    given = {"attention_mask": mask, **MODES[mode], **ALL}
    expected = generated(model, ids, **given)
    found = generated(model, ids, cache_implementation="static", **given)
    assert isinstance(found.past_key_values, StaticCache)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits)


def test_a_cache_of_fixed_size_is_filled_by_any_number_of_tokens():
    model, (ids, mask) = model_of("rotary, grouped, tied"), prompts()
    with torch.no_grad():
        cache, expected = StaticCache(model.config, max_cache_len=12), model(ids, attention_mask=mask).logits
        ends, parts = (5, 8, 9), []
        for first, end in zip((0, 5, 8), ends, strict=True):
            given = {"attention_mask": mask[:, :end], "past_key_values": cache}
            parts.append(model(ids[:, first:end], **given).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], expected[mask == 1])


def test_a_compiled_step_with_a_cache_of_fixed_size_changes_nothing():
    """As on GPUs, where generation with such a cache compiles each step by itself."""
    model, (ids, mask) = model_of("learned", depth=1), prompts()
    compiled = CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    options = {"attention_mask": mask, "cache_implementation": "static", "max_new_tokens": 4}
    found = generated(model, ids, compile_config=compiled, **options)
    assert torch.equal(found, generated(model, ids, attention_mask=mask, max_new_tokens=4))
    assert hasattr(model, "_compiled_call")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_begin_what_tokens_begin(kind, options):
    model, (ids, mask) = model_of(kind), prompts()
    given = {"attention_mask": mask, **options}
    embedded = model.get_input_embeddings()(ids)
    expected = generated(model, ids, **given)
    found = generated(model, inputs_embeds=embedded, **given)
    assert torch.equal(found, expected[:, 9:])
    assert torch.equal(generated(model, ids, inputs_embeds=embedded, **given), expected)
    # Not of the tokens that stand beside them.
    other = generated(model, inputs_embeds=embedded + torch.randn(32), **given)
    assert not torch.equal(other, found)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_a_learned_prompt_is_trained_and_begins_the_text():
    """peft's prompt tuning, whose embeddings stand before those of the tokens."""
    peft = pytest.importorskip("peft")
    model, (ids, _) = model_of("rotary, grouped, tied"), prompts()
    mask = torch.ones_like(ids)
    sizes = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4}  # which it knows by other names alone
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes))
    tuned(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    found = {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}
    assert [p.shape for p in found.values()] == [(3, 32)]
    prompt = tuned.get_prompt(2).detach().requires_grad_()
    given = {"inputs_embeds": torch.cat((prompt, model.get_input_embeddings()(ids)), 1)}
    whole = torch.cat((torch.ones(2, 3, dtype=mask.dtype), mask), 1)
    labels = torch.cat((torch.full((2, 3), -100), ids), 1)
    model(**given, attention_mask=whole, labels=labels).loss.backward()
    torch.testing.assert_close(*found.values(), prompt.grad.sum(0))
    expected = generated(model, attention_mask=whole, **given)
    for use_cache in (True, False):
        written = generated(tuned.eval(), input_ids=ids, attention_mask=mask, use_cache=use_cache)
        assert torch.equal(written[:, 9:], expected), use_cache


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_on_from_what_a_cache_holds(cache):
    model, (ids, mask) = model_of("rotary, grouped, tied"), prompts()
    whole = generated(model, ids, attention_mask=mask)
    held = StaticCache(model.config, max_cache_len=24) if cache == "static" else DynamicCache()
    first = {"attention_mask": mask, "past_key_values": held, "return_dict_in_generate": True, "max_new_tokens": 3}
    begun = generated(model, ids, **first)
    assert begun.past_key_values is held
    longer = torch.cat((mask, torch.ones(2, 3, dtype=mask.dtype)), 1)
    rest = {"attention_mask": longer, "past_key_values": held, "max_new_tokens": 5}
    assert torch.equal(generated(model, begun.sequences, **rest), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_no_token(kind):
    model, (ids, mask) = model_of(kind), prompts()
    both = generated(model, ids, attention_mask=mask)
    for row, first in ((0, 4), (1, 0)):
        alone = generated(model, ids[row : row + 1, first:])
        assert torch.equal(both[row : row + 1, first:], alone)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(given, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_guessed_tokens_change_nothing(kind):
    """Of an assistant, of the model itself, and of the prompt: each is checked by the model, and cropped if wrong."""
    model, (ids, _) = model_of(kind), prompts(1)
    ids = torch.cat((ids, ids), 1)
    expected = generated(model, ids)
    other = small_model("Llama", torch.float32).eval()
    for options in ({"assistant_model": other}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(generated(model, ids, **options), expected), options
    sampled = generated(model, ids, assistant_model=other, do_sample=True)
    assert sampled.shape == (1, 26)


def test_a_prompt_may_be_read_in_pieces():
    model, (ids, mask) = model_of("alibi with a window"), prompts()
    expected = generated(model, ids, attention_mask=mask)
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generated(model, ids, attention_mask=mask, prefill_chunk_size=4, **more), expected)


def test_generation_begins_with_nothing_and_ends_where_asked():
    model, (ids, _) = model_of("learned"), prompts()
    begun = generated(model, bos_token_id=5)
    assert torch.equal(begun, generated(model, torch.tensor([[5]])))
    whole = generated(model, ids)
    end = int(whole[0, 12])
    stopped = generated(model, ids, eos_token_id=end)
    first = (whole[0, 9:] == end).nonzero()[0].item() + 9
    assert torch.equal(stopped[0, : first + 1], whole[0, : first + 1])
    assert (stopped[0, first + 1 :] == 0).all()
    several = generated(model, ids, num_return_sequences=3, do_sample=True)
    assert several.shape == (6, 17)
    assert torch.equal(several[:, :9], ids.repeat_interleave(3, 0))


def test_its_generation_settings_come_back(tmp_path):
    model, (ids, _) = model_of("learned"), prompts()
    model.generation_config = GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.num_beams == 2
    assert torch.equal(loaded.generate(ids), model.generate(ids))


def test_what_generation_cannot_return_is_refused():
    model, (ids, _) = model_of("learned"), prompts()
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=name):
            generated(model, ids, return_dict_in_generate=True, **{name: True})


def test_a_cache_that_forgets_is_refused():
    mistral, model, (ids, _) = small_model("Mistral", torch.float32), model_of("learned"), prompts()
    cache = DynamicCache(config=mistral.config)
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values: expected a cache that keeps every token"):
            model(ids[:, 7:], past_key_values=cache)


def test_a_cache_is_refused_where_gradients_would_be_lost():
    model, (ids, _) = model_of("learned"), prompts()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 9
    with pytest.raises(ValueError, match="gradients enabled"):
        model(ids, past_key_values=cache)


def test_a_pipeline_writes_text(caplog):
    model, tokenizer = model_of("learned", num_tokens=256), byte_tokenizer()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["one text", "another"]
    found = write(texts, batch_size=2, return_full_text=False, **GREEDY)
    assert "not supported" not in caplog.text
    for text, [written] in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = tokenizer.decode(generated(model, ids)[0, ids.shape[1] :], skip_special_tokens=True)
        assert written["generated_text"] == expected
