"""A model of transformers gives the same loss and gradients in less memory, and is what it was after restore."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import feed_forward, make_memory_efficient, restore
from memory_efficient_attention_pytorch.huggingface.attention import memory_efficient_attention
from memory_efficient_attention_pytorch.huggingface.logits import LazyLogits
from memory_efficient_attention_pytorch.huggingface.visibility import NAME, memory_efficient_mask
from memory_efficient_attention_pytorch.torch_internals.capabilities import taken_away

from .models import FAMILIES, KINDS, MORE, of_family, small_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
CLOSE = {torch.float64: 1e-6, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def chunks_of_a_few_tokens(monkeypatch):
    monkeypatch.setattr(feed_forward, "chunks_for", lambda x, hidden: min(3, x.shape[1]))


def padded(side, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    return {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(ids):
    lengths = (7, 1, ids.shape[1] - 8)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {"position_ids": positions.expand(len(ids), -1), "labels": ids, "use_cache": False}


def inputs(case, ids):
    if case in ("left", "right"):
        return padded(case, ids)
    return packed(ids) if case == "packed" else {"labels": ids}


def step(model, ids=None, **given):
    model.zero_grad(set_to_none=True)
    loss = model(**given if ids is None else {"input_ids": ids, **given}).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance, check_dtype=False)
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        scale = max(1.0, expected[1][name].abs().max().item())
        error = (found[1][name] - expected[1][name]).abs().max().item()
        assert error <= tolerance * scale, (name, error)


@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_its_own_attention(kind, case):
    # Its own eager attention softmaxes in fp32, where the lowest fp64 is -inf: NaN where a query sees nothing.
    dtype = torch.float32 if (kind, case) == ("Gemma2", "left") else torch.float64
    model, ids = small_model(kind, dtype), tokens()
    given = inputs(case, ids)
    if dtype == torch.float32:  # what a padded query makes of all keys predicts the first token of all
        given["labels"][0, 5] = -100
    expected = step(model, ids, **given)
    report = make_memory_efficient(model)
    assert_same_step(step(model, ids, **given), expected, CLOSE[dtype])
    changed = {part for part, _ in report.changed}
    assert changed == {"attention", "loss", "layers", *([] if kind == "GptOss" else ["2 MLPs"])}
    restore(model)
    again = step(model, ids, **given)
    assert torch.equal(again[0], expected[0])
    assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())


POSITIONS = {
    "start again": [*range(7), *range(16)],
    "holes": [0, 1, 2, *range(7, 27)],
    "repeated": [i // 2 for i in range(23)],
    "of padding on the left, by hand": [*[0] * 5, *range(18)],
    "downwards": [*range(22, -1, -1)],
    "later": [*range(5, 28)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_positions_mean_what_they_mean_to_transformers(kind):
    """There a step of other than one begins a document where no cache is made; with a cache all is one sequence."""
    ids = tokens()
    settings = (
        ({"use_cache": False}, False, True),
        ({}, True, True),  # its own checkpointing makes no cache either
        ({}, False, False),
    )
    for (name, positions), (given, own, checkpoint) in itertools.product(POSITIONS.items(), settings):
        model = small_model(kind)
        if own:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = {"position_ids": torch.tensor([positions, range(23)]), "labels": ids, **given}
        expected = step(model, ids, **inputs)
        make_memory_efficient(model, checkpoint=checkpoint)
        try:
            assert_same_step(step(model, ids, **inputs), expected, 1e-6)
        except AssertionError as error:
            raise AssertionError(f"{name}, {given}, own checkpoints: {own}") from error


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_in_fp32(kind):
    model, ids = small_model(kind, torch.float32), tokens()
    expected = step(model, ids, labels=ids)
    make_memory_efficient(model)
    assert_same_step(step(model, ids, labels=ids), expected, CLOSE[torch.float32])


@pytest.mark.parametrize("kind", MORE)
def test_other_decoders_give_the_same_step_and_text_and_say_what_is_left(kind):
    ids = tokens()
    for dtype, case in ((torch.float64, "plain"), (torch.float64, "right"), (torch.float32, "plain")):
        model, given = small_model(kind, dtype), inputs(case, ids)
        expected = step(model, ids, **given)
        report = make_memory_efficient(model)
        assert_same_step(step(model, ids, **given), expected, CLOSE[dtype])
        restore(model)
        again = step(model, ids, **given)
        assert torch.equal(again[0], expected[0])
        assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())
    left = MORE[kind][1]
    assert dict(report.left) == left
    changed = {"attention": "attention", "MLPs": "2 MLPs", "loss": "loss", "layers": "layers"}
    assert {part for part, _ in report.changed} == {named for part, named in changed.items() if part not in left}
    assert_writes_the_same(model.eval())


@pytest.mark.parametrize("name", FAMILIES)
def test_encoders_both_halves_images_and_experts_give_the_same_step_and_say_what_is_left(name):
    model, given, left = of_family(name)
    expected = step(model, **given)
    assert all(g.isfinite().all() for g in expected[1].values())
    report = make_memory_efficient(model)
    assert_same_step(step(model, **given), expected, 1e-6)
    assert dict(report.left) == left
    assert {"attention", "layers"} <= {part for part, _ in report.changed}
    chunked = any("MLPs" in part for part, _ in report.changed)
    assert chunked == (name not in ("BERT", "RoBERTa", "Mixtral", "Qwen 2 MoE", "BART", "Whisper"))
    restore(model)
    again = step(model, **given)
    assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_unchanged(kind):
    assert_writes_the_same(small_model(kind, torch.float32).eval())


def assert_writes_the_same(model):
    """With caches that grow and, where the model itself has them, of fixed size."""
    ids = tokens(length=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    make_memory_efficient(model)
    assert torch.equal(model.generate(ids, **options), expected)
    if model._can_compile_fullgraph:
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(ids, **static, **options), expected)


def test_autocast_in_bf16_is_as_close_to_the_truth_as_its_own():
    model, ids = small_model("Llama", torch.float32), tokens()
    truth = step(model, ids, labels=ids)

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        model.zero_grad()
        loss.backward()
        return max((p.grad - truth[1][n]).abs().max().item() for n, p in model.named_parameters())

    own = error()
    make_memory_efficient(model)
    assert 0 < error() <= own * 1.25 + 1e-4


def test_frozen_parts_get_no_gradient():
    model, ids = small_model("Llama"), tokens()
    for part in (model.model.embed_tokens, model.model.layers[0], model.lm_head):
        part.requires_grad_(False)
    expected = step(model, ids, labels=ids)
    make_memory_efficient(model)
    assert_same_step(step(model, ids, labels=ids), expected, 1e-6)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_adapters_are_trained_as_before(targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    options = {"r": 2, "target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model, ids = peft.get_peft_model(small_model("Llama"), peft.LoraConfig(**options)).double(), tokens()
    expected = step(model, ids, labels=ids)
    report = make_memory_efficient(model)
    assert_same_step(step(model, ids, labels=ids), expected, 1e-6)
    parts = {part for part, _ in report.changed}
    assert ("loss" in parts) == ("lm_head" not in targets)
    assert "2 MLPs" in parts
    before = model.state_dict().keys()
    restore(model)
    assert model.state_dict().keys() == before


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mistral", "Gemma3"])
def test_learned_keys_are_trained_as_before(kind, side):
    """peft's prefix tuning, which passes them as a cache that grows; the layers are not checkpointed."""
    peft = pytest.importorskip("peft")
    sizes = {"num_layers": 2, "num_attention_heads": 4 if kind == "GPT2" else 2}
    sizes["token_dim"] = 8 * sizes["num_attention_heads"]
    for length in (4, 9):  # shorter and longer than the windows
        torch.manual_seed(3)
        prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, **sizes)
        model, ids = peft.get_peft_model(small_model(kind), prefix).double(), tokens()
        expected = step(model, ids, **inputs(side, ids))
        assert [g.shape for g in expected[1].values()] == [(length, 4 * sizes["token_dim"])]
        report = make_memory_efficient(model)
        assert_same_step(step(model, ids, **inputs(side, ids)), expected, 1e-6)
        assert [part for part, _ in report.left] == ["layers"]
        assert {part for part, _ in report.changed} == {"attention", "2 MLPs", "loss"}


def test_a_cache_that_checkpoints_drop_is_refused():
    model, ids = small_model("Llama"), tokens()
    with torch.no_grad():
        cache = model.eval()(input_ids=ids[:, :9], use_cache=True).past_key_values
    make_memory_efficient(model.train())
    with pytest.raises(NotImplementedError, match=r"not 14 × 14 \(checkpointed layers are given no cache\)"):
        model(input_ids=ids[:, 9:], past_key_values=cache, labels=ids[:, 9:])


def test_what_is_saved_is_what_was_there(tmp_path):
    model = small_model("Gemma2")
    model.save_pretrained(tmp_path / "before")
    make_memory_efficient(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


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


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_trainer_evaluates_and_predicts_as_before(precision, tmp_path, monkeypatch):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(batch=5, length=12)]
    made, materialize = [], LazyLogits.materialize
    monkeypatch.setattr(LazyLogits, "materialize", lambda logits: [made.append(1), materialize(logits)][1])

    def found(model, **options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2,
            **precision,
        )  # fmt: skip
        trainer = Trainer(model, arguments, eval_dataset=data, **options)
        loss = trainer.evaluate()["eval_loss"]
        return (loss, trainer.predict(data).predictions) if options else loss

    def metrics(prediction):
        return {"sum": float(prediction.predictions.sum())}

    expected = found(small_model("Llama", torch.float32), compute_metrics=metrics)
    model = small_model("Llama", torch.float32)  # accelerate replaces a model's forward, and so its loss is left
    make_memory_efficient(model)
    assert found(model) == pytest.approx(expected[0], rel=1e-2 if precision else 1e-5)
    assert not made
    tolerance = 2e-2 if precision else 2e-5
    loss, predictions = found(model, compute_metrics=metrics)
    assert loss == pytest.approx(expected[0], rel=tolerance)
    assert made
    assert predictions.shape == (5, 12, 61)
    torch.testing.assert_close(*map(torch.from_numpy, (predictions, expected[1])), rtol=tolerance, atol=tolerance)


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


def test_masks_of_four_dimensions_are_taken():
    model, ids = small_model("Llama"), tokens()
    causal = torch.ones(23, 23, dtype=torch.bool).tril().expand(2, 1, 23, 23).clone()
    causal[:, :, 5:, 2] = False
    added = torch.zeros(causal.shape, dtype=torch.float64).masked_fill(~causal, -1e9)
    expected = step(model, ids, labels=ids, attention_mask=causal)
    make_memory_efficient(model)
    for mask in (causal, added):
        assert_same_step(step(model, ids, labels=ids, attention_mask=mask), expected, 1e-6)


def test_a_copy_stands_on_its_own():
    model, ids = small_model("Llama"), tokens()
    make_memory_efficient(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fresh = small_model("Llama")
    expected = step(fresh, ids, labels=ids)
    assert_same_step(step(copied, ids, labels=ids), expected, 1e-6)
    restore(copied)
    assert all(torch.equal(g, step(copied, ids, labels=ids)[1][n]) for n, g in expected[1].items())


def test_restore_leaves_no_trace():
    model = small_model("Llama")

    def traces():
        return [{k: v for k, v in vars(m).items() if k not in ("_modules", "_parameters")} for m in model.modules()]

    before, config = [copy.copy(t) for t in traces()], dict(vars(model.config))
    hooks = len(model.model.embed_tokens._forward_hooks)
    make_memory_efficient(model)
    restore(model)
    assert [t.keys() for t in traces()] == [t.keys() for t in before]
    assert vars(model.config) == config
    assert len(model.model.embed_tokens._forward_hooks) == hooks


def test_what_cannot_be_served_is_refused_by_name():
    model, ids = small_model("Llama"), tokens()
    with pytest.raises(ValueError, match="one that make_memory_efficient changed"):
        restore(model)
    make_memory_efficient(model)
    with pytest.raises(ValueError, match="model"):
        make_memory_efficient(model)
    with pytest.raises(NotImplementedError, match="LlamaAttention of layer 0: output_attentions"):
        model(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"labels: expected a number for each of the logits, \(2, 5\), got \(2, 23\)"):
        model(input_ids=ids, labels=ids, logits_to_keep=5)
    with pytest.raises(ValueError, match="a model of transformers"):
        make_memory_efficient(torch.nn.Linear(2, 2))


def test_a_model_whose_mask_would_be_lost_keeps_its_attention():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)).train()
    ids = tokens()
    expected = step(model, ids, labels=ids)
    report = make_memory_efficient(model)
    assert "makes its own masks, which would be lost" in dict(report.left)["attention"]
    assert model.config._attn_implementation != NAME
    assert_same_step(step(model, ids, labels=ids), expected, 2e-5)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"attention_mask": None}, "it passes no mask for 2 queries and 5 keys"),
        ({"attention_mask": memory_efficient_mask(1, 3, 5, q_offset=2)}, "its mask is for 3 × 5 tokens, not 2 × 5"),
        ({"cache": object()}, "a paged cache is not supported"),
        ({"softcap": 2.0, "position_bias": torch.zeros(1, 1, 2, 5)}, "softcap: not together with a bias"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_attention_that_would_be_wrong_is_refused_by_the_layer(given, why):
    layer = small_model("Llama").model.layers[1].self_attn
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    arguments = {"attention_mask": memory_efficient_mask(1, 2, 5, q_offset=3), **given}
    with pytest.raises(NotImplementedError, match=f"LlamaAttention of layer 1: .*{why}"):
        memory_efficient_attention(layer, query, key, key, **arguments)


def test_what_is_not_recognised_is_left_and_said():
    report = make_memory_efficient(small_model("GptOss"))
    assert all("experts" in why for _, why in report.left)
    assert len(report.left) == 2
    assert "mixture of experts" in str(report)


def test_dropout_has_its_own_expectation():
    model, ids = small_model("Llama", attention_dropout=0.5), tokens(batch=64, length=8)
    model.train()

    def losses():
        return torch.stack([model(input_ids=ids, labels=ids).loss.detach() for _ in range(30)])

    own = losses()
    make_memory_efficient(model, checkpoint=False)
    ours = losses()
    assert ours.std() > 0
    assert (ours.mean() - own.mean()).abs() < 4 * (own.var() / 30 + ours.var() / 30).sqrt()


def test_a_trainer_accumulates_the_same_gradients(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trained(change):
        model = small_model("Llama", torch.float32)
        if change:
            make_memory_efficient(model)
        data = [{"input_ids": row, "labels": row} for row in tokens(batch=8, length=12)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", optim="sgd", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train()
        return model.state_dict()

    expected, found = trained(False), trained(True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5)


class Causal(torch.nn.Module):
    """Linear layers alone, and every token sees those before it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 9), torch.nn.Linear(9, 4)

    def forward(self, x):
        return self.down(self.up(x).cumsum(1))


def test_what_mixes_tokens_is_not_cut():
    found = list(feed_forward.candidates(torch.nn.ModuleDict({"mixer": Causal()})))
    assert [(name, why) for name, _, why in found] == [("mixer", "a token's output depends on other tokens")]


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
