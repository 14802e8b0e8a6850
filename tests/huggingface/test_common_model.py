"""What transformers asks of every model in its common tests, asked of our Transformer as one of its models.

Asked in ``test_model.py``: save and load, training by Trainer, resized vocabularies, padding on either side, copies.
Not asked, since there is nothing to ask:

- outputs of attentions and hidden states, and gradients kept on them: neither exists, and both are refused in words;
- gradient checkpointing: blocks are reversible, and transformers refuses it by the class's name;
- feed-forward chunking by ``chunk_size_feed_forward``: pieces are chosen by ``ff_chunks``;
- resized positions: transformers' interface for them is not there, and refuses;
- masks of four dimensions, packed sequences, attention's implementations: attention is our own, and refuses both;
- base model, sequence and token classification, question answering: there is a language model alone;
- rope scaling: rotary positions have no options; tensor parallelism: there is no plan of it; what needs a GPU.
"""

import io

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from memory_efficient_attention_pytorch.huggingface import MemoryEfficientConfig, MemoryEfficientForCausalLM

from .ours import KINDS, SMALL, model_of, prompts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TIED = "rotary, grouped, tied"


def loaded_with_report(directory, **options):
    return MemoryEfficientForCausalLM.from_pretrained(directory, output_loading_info=True, **options)


def is_clean(report):
    return not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_configuration_comes_back_whole(tmp_path):
    config = MemoryEfficientConfig(**SMALL, **KINDS["alibi with a window"], id2label={0: "a"}, eos_token_id=3)
    assert MemoryEfficientConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MemoryEfficientConfig
    assert loaded.transformer_keywords() == config.transformer_keywords()
    assert (loaded.eos_token_id, loaded.vocab_size, loaded.num_hidden_layers) == (3, 61, 2)
    loaded.hidden_size = 64
    assert loaded.dim == 64


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_every_weight_once_and_nothing_else(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == dict(model.named_parameters()).keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(written[name], value)
        assert value.is_contiguous()
    assert ("net.to_logits.1.weight" in written) == (kind != TIED)
    again, report = loaded_with_report(tmp_path)
    assert is_clean(report)
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_shards_and_pickles_come_back(kind, tmp_path):
    model, (ids, _) = model_of(kind), prompts()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, report = loaded_with_report(tmp_path)
    assert is_clean(report)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = MemoryEfficientForCausalLM(model.config)
    assert other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    expected = model(ids).logits
    for found in (loaded, other.eval()):
        assert torch.equal(found(ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_a_directory_lacks_are_drawn_as_those_of_a_new_model(kind, tmp_path):
    """A directory without any weight: each has the mean and spread that construction gives it."""
    from safetensors.torch import save_file

    model = model_of(kind)
    model.save_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = loaded_with_report(tmp_path)
    assert set(report["missing_keys"]) == model.state_dict().keys()
    for name, value in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert abs(value.mean() - expected.mean()) < 5 * expected.std(correction=0) / expected.numel() ** 0.5 + 1e-6
        torch.testing.assert_close(value.std(correction=0), expected.std(correction=0), rtol=0.35, atol=1e-6)


def test_weights_of_another_shape_are_drawn_where_that_is_asked_for(tmp_path):
    model, (ids, _) = model_of("learned"), prompts()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        MemoryEfficientForCausalLM.from_pretrained(tmp_path, num_tokens=70)
    loaded, report = loaded_with_report(tmp_path, num_tokens=70, ignore_mismatched_sizes=True)
    assert {name for name, *_ in report["mismatched_keys"]} == {
        "net.token_emb.weight", "net.to_logits.1.weight", "net.to_logits.1.bias"
    }  # fmt: skip
    assert loaded(ids).logits.shape == (2, 9, 70)
    assert 0.5 < loaded.net.token_emb.weight.std() < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "auto"])
def test_precisions_are_those_asked_for_or_those_of_the_file(dtype, tmp_path):
    model_of(TIED).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert loaded.dtype == expected
    assert loaded(prompts()[0]).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_meta_takes_weights_afterwards(kind):
    model, (ids, _) = model_of(kind), prompts()
    with torch.device("meta"):
        hollow = MemoryEfficientForCausalLM(model.config).eval()
    assert all(p.is_meta for p in hollow.parameters())
    hollow.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(hollow(ids).logits, model(ids).logits)


@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_it_is_loaded_onto_devices(place, tmp_path):
    pytest.importorskip("accelerate")
    model, (ids, mask) = model_of(TIED), prompts()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=place)
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_layers_on_disk_compute_the_same(tmp_path):
    pytest.importorskip("accelerate")
    model, (ids, mask) = model_of("learned"), prompts()
    model.save_pretrained(tmp_path / "weights")
    places = {"net.token_emb": "cpu", "net.pos_emb": "cpu", "net.layers.0": "cpu", "net.layers.1": "disk"}
    options = {"device_map": {**places, "net.to_logits": "cpu"}, "offload_folder": tmp_path / "layers"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", **options)
    assert any(p.is_meta for p in loaded.parameters())
    found, expected = (m.generate(ids, attention_mask=mask, max_new_tokens=5, pad_token_id=0) for m in (loaded, model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_calls_and_any_batch_give_the_same(kind):
    model, (ids, _) = model_of(kind), prompts(4)
    logits = model(ids).logits
    assert torch.equal(model(ids).logits, logits)
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(alone, logits)


def test_tuples_hold_what_the_named_outputs_hold():
    model, (ids, mask) = model_of("learned"), prompts()
    for given in ({}, {"labels": ids}, {"attention_mask": mask, "use_cache": True}):
        with torch.no_grad():
            named, flat = model(ids, **given), model(ids, **given, return_dict=False)
        assert len(named.to_tuple()) == len(flat)
        assert torch.equal(named.to_tuple()[0], flat[0])


@pytest.mark.parametrize("positions", [{}, {"positions": "rotary"}, {"positions": "alibi"}])
@pytest.mark.parametrize("way", [{}, {"reversible": False}, {"exact": True}])
def test_embeddings_in_the_place_of_tokens_give_the_same_and_get_a_gradient(positions, way):
    torch.manual_seed(0)
    model = MemoryEfficientForCausalLM(MemoryEfficientConfig(**SMALL, **positions, **way)).double()
    ids, mask = prompts()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    before = embedded.detach().clone()
    given = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    loss = model(ids, **given).loss
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    of_tokens = expected.pop("net.token_emb.weight")
    model.zero_grad(set_to_none=True)
    found = model(inputs_embeds=embedded, **given).loss
    found.backward()
    assert torch.equal(found, loss)
    assert model.net.token_emb.weight.grad is None
    summed = torch.zeros_like(of_tokens).index_add_(0, ids.flatten(), embedded.grad.flatten(0, 1))
    torch.testing.assert_close(summed, of_tokens)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded, attention_mask=mask).logits, model(ids, mask).logits)
    assert torch.equal(embedded.detach(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_another_dtype_are_refused_by_name_and_taken_under_autocast(kind):
    model, (ids, _) = model_of(kind), prompts()
    embedded = model.get_input_embeddings()(ids).detach()
    for dtype in (torch.bfloat16, torch.float64):
        if kind == "learned" and dtype == torch.bfloat16:
            continue  # adding positions makes them the model's
        for labels in (None, ids):
            expected = f"inputs_embeds: expected embeddings of the model's dtype, torch.float32, .*, got {dtype}"
            with pytest.raises(ValueError, match=expected):
                model(inputs_embeds=embedded.to(dtype), labels=labels)
            with pytest.raises(ValueError, match=f"x: expected embeddings .*, got {dtype}"):
                model.net(embedded.to(dtype), labels=labels)
    taken = embedded.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs_embeds=taken, labels=ids).loss
        with pytest.raises(ValueError, match=r"inputs_embeds: .* got torch.float64"):
            model(inputs_embeds=embedded.double())
    loss.backward()
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, rtol=2e-2, atol=2e-2)
    assert taken.grad.isfinite().all()
    assert torch.isfinite(model.bfloat16()(inputs_embeds=embedded.bfloat16(), labels=ids).loss)


def test_embeddings_are_read_and_replaced():
    model, (ids, _) = model_of("learned"), prompts()
    expected = model(ids).logits
    order = torch.randperm(61, generator=torch.Generator().manual_seed(3))
    embedding, head = torch.nn.Embedding(61, 32), torch.nn.Linear(32, 61)
    with torch.no_grad():
        embedding.weight[order] = model.get_input_embeddings().weight
        head.weight[order], head.bias[order] = model.get_output_embeddings().weight, model.get_output_embeddings().bias
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embedding
    assert model.get_output_embeddings() is head
    torch.testing.assert_close(model(order[ids]).logits[..., order], expected)
    assert model_of(TIED).get_output_embeddings() is None


def test_a_smaller_vocabulary_keeps_its_first_tokens_and_a_step_reaches_the_new_ones():
    for kind in KINDS:
        model, (ids, _) = model_of(kind), prompts()
        model.resize_token_embeddings(40)
        kept = ids % 40
        assert model(kept).logits.shape[-1] == model.config.vocab_size == 40
        with pytest.raises(ValueError, match="tokens from 0 to 39"):
            model(kept + 21)
        model.resize_token_embeddings(45, pad_to_multiple_of=8)
        assert model.config.vocab_size == 48
        model(kept + 8, labels=kept + 8).loss.backward()
        assert model.get_input_embeddings().weight.grad.shape == (48, 32)


def test_a_step_changes_every_weight_and_frozen_ones_stay():
    for kind in KINDS:
        model, (ids, _) = model_of(kind), prompts(6)
        model.train()
        model.net.layers[0].requires_grad_(False)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (".layers.0." in name), name


def test_the_loss_takes_the_arguments_of_the_library():
    model, (ids, _) = model_of("learned"), prompts()
    logits = model(ids).logits
    shifted = ids.roll(-1, 1).masked_fill(ids > 50, -7)
    cases = ({"labels": ids}, {"shift_labels": shifted, "ignore_index": -7}, {"labels": ids, "num_items_in_batch": 5})
    for case in cases:
        expected = model.loss_function(**{"labels": None, **case}, logits=logits, vocab_size=61)
        torch.testing.assert_close(model(ids, **case).loss, expected)


def test_logits_of_the_last_tokens_alone():
    model, (ids, _) = model_of("learned"), prompts()
    whole = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 7])).logits, whole[:, [1, 7]])
    assert torch.equal(model(ids, logits_to_keep=0).logits, whole)


def test_smoothed_labels_are_shifted(tmp_path):
    """Trainer smooths by itself: it takes the labels away, and shifts them for models that it knows by name."""
    model, (ids, _) = model_of("learned"), prompts(4)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    found = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


def test_a_trainer_evaluates_and_predicts(tmp_path):
    model, (ids, _) = model_of("learned"), prompts(4)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, eval_dataset=[{"input_ids": row, "labels": row} for row in ids])
    expected = model(ids, labels=ids).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = trainer.predict([{"input_ids": row} for row in ids]).predictions
    torch.testing.assert_close(torch.from_numpy(predicted), model(ids).logits.detach())


def test_what_would_be_lost_is_refused():
    ids, _ = prompts()
    for name in ("output_hidden_states", "output_attentions"):
        model = model_of("learned")
        with pytest.raises(ValueError, match=name):
            model(ids, **{name: True})
        setattr(model.config, name, True)
        with pytest.raises(ValueError, match=name):
            model(ids)
        assert model(ids, **{name: False}).logits.shape == (2, 9, 61)
    model = model_of("learned")
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"input_ids: expected tokens .*, got both"):
        model(ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match=r"input_ids: expected tokens .*, got neither"):
        model()
    with pytest.raises(ValueError, match=r"x: expected .*\(batch, tokens, 32\), got torch.float32 \(2, 9, 31\)"):
        model(inputs_embeds=embedded[..., :31])
    with pytest.raises(ValueError, match="gradients enabled"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="tie_word_embeddings: expected False; tie_embeddings"):
        MemoryEfficientForCausalLM(MemoryEfficientConfig(**SMALL, tie_word_embeddings=True))
    with pytest.raises(NotImplementedError, match="resize_position_embeddings"):
        model.resize_position_embeddings(60)
