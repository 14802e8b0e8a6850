"""A model of transformers gives the same loss and gradients in less memory, and is what it was after restore."""

import copy
import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import make_memory_efficient, restore
from tests.agreement import apart

from .models import FAMILIES, KINDS, MORE, of_family, small_model, tokens
from .steps import assert_same_step, inputs, step

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("chunks_of_a_few_tokens"),
]
CLOSE = {torch.float64: 1e-6, torch.float32: 2e-5}


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


@pytest.mark.parametrize(
    "make",
    [
        lambda: (small_model("Doge"), {"input_ids": (ids := tokens()), **inputs("plain", ids)}),
        lambda: (small_model("Doge"), {"input_ids": (ids := tokens()), **inputs("right", ids)}),
        lambda: of_family("BEiT")[:2],
    ],
)
def test_a_model_that_reads_its_mask_gets_one_and_a_warning(make):
    """Doge adds a mask of its own to it at each layer, BEiT a bias."""
    model, given = make()
    expected = step(model, **given)
    make_memory_efficient(model)
    with pytest.warns(UserWarning, match="the model itself reads its mask, which is made as a tensor") as told:
        found = step(model, **given)
    assert {"modeling_doge.py", "modeling_beit.py"} & {Path(warning.filename).name for warning in told}
    assert_same_step(found, expected, CLOSE[torch.float64])


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_a_layer_says_whether_it_is_causal_where_its_own_attention_gets_no_mask(own):
    """PaliGemma's layers say no and its masks yes; eager attention has the masks."""
    model, given, _ = of_family("PaliGemma")
    model.set_attn_implementation(own)
    given = {name: value for name, value in given.items() if name not in ("token_type_ids", "attention_mask")}
    expected = step(model, **given)
    make_memory_efficient(model)
    assert_same_step(step(model, **given), expected, 1e-6)


def test_each_query_has_a_score_without_a_value():
    """Inkling 2 computes it from the query's token. Its router has no fp64."""
    own = {"unpadded_vocab_size": 61, "d_rel": 4, "rel_extent": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    own |= {"moe_intermediate_size": 16, "sliding_window_size": 6, "experts_implementation": "eager"}
    own |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
    model, ids = small_model("Inkling2", torch.float32, **own), tokens()
    expected = step(model, ids, labels=ids)
    assert any("sink_proj" in name for name in expected[1])
    make_memory_efficient(model)
    assert_same_step(step(model, ids, labels=ids), expected, CLOSE[torch.float32])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "BEiT"])  # which reads its mask
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
        return apart({name: p.grad for name, p in model.named_parameters()}, truth[1])

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


def test_what_is_saved_is_what_was_there(tmp_path):
    model = small_model("Gemma2")
    model.save_pretrained(tmp_path / "before")
    make_memory_efficient(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


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
