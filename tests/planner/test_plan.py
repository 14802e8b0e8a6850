"""``plan`` and ``max_seq_len`` as a user calls them."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.planner import CATEGORIES, plan, workload
from memory_efficient_attention_pytorch.planner.candidates import candidates
from memory_efficient_attention_pytorch.planner.step import dry_run
from memory_efficient_attention_pytorch.torch_internals import ALL

CONFIG = {"num_tokens": 256, "dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "causal": True}


def planned(config=CONFIG, **options):
    return plan(config, **{"batch_size": 1, "seq_len": 2048, "device": "cpu", "threads": 2, **options})


def ways(*arguments, **options):
    """The candidates' names and settings, each with those of all before it."""
    settings, found = {}, []
    for name, changes in candidates(*arguments, **options):
        settings = {**settings, **changes}
        found.append((name, settings))
    return found


def test_a_plan_tells_where_its_peak_is_and_what_it_consists_of():
    made = planned()
    assert made.peak_bytes == sum(made.breakdown.values()) == made.timeline.totals.max()
    assert tuple(made.breakdown) == CATEGORIES
    parameters = sum(p.numel() for p in Transformer(max_seq_len=2048, **CONFIG).parameters())
    assert made.breakdown["parameters"] == made.breakdown["gradients"] == 4 * parameters
    assert made.breakdown["optimizer"] >= 8 * parameters
    assert made.peak.phase in ("forward", "loss", "backward", "optimizer")
    assert made.peak == made.timeline.operations[made.timeline.peak]
    assert made.flops > 6 * parameters * 2048
    assert made.fits(made.peak_bytes)
    assert not made.fits(made.peak_bytes - 1)


def test_memory_free_of_depth_and_memory_that_grows_with_it():
    def streams(depth, **changes):
        made = planned({**CONFIG, "depth": depth, **changes}, optimizer=None)
        return sum(made.breakdown[part] for part in ("streams", "attention", "feed-forward", "loss"))

    stored = {"reversible": False}
    per_block = 2048 * CONFIG["dim"] * 4
    assert streams(24) == streams(2)
    assert streams(24, **stored) - streams(2, **stored) > 22 * 10 * per_block


def test_a_million_tokens_are_no_more_work_than_a_few(monkeypatch):
    ran = []

    def counted(*arguments, **options):
        ran.append(dry_run(*arguments, **options))
        return ran[-1]

    monkeypatch.setattr(workload, "dry_run", counted)
    config = {**CONFIG, "depth": 24, "ff_chunks": 64, "head_chunks": 4}
    for seq_len in (2**15, 2**20):
        planned(config, seq_len=seq_len, device="cuda")
    operations = [len(timeline.operations) for timeline in ran]
    assert len(operations) == 4
    assert operations[:2] == operations[2:]
    assert sum(operations[:2]) < 12_000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_first_plan_of_a_process_is_as_any_other(device):
    """Looking up what this PyTorch can do is no part of a step."""
    expected = planned({**CONFIG, "depth": 5}, device=device)
    for part in ALL.values():
        part._looked_up = False
    first = planned({**CONFIG, "depth": 5}, device=device)
    assert first.timeline.operations == expected.timeline.operations
    np.testing.assert_array_equal(first.timeline.live, expected.timeline.live)


def test_planning_draws_no_random_numbers_and_changes_no_settings():
    before = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    for device in ("cpu", "cuda"):
        planned({**CONFIG, "dropout": 0.1}, device=device, autocast="bf16", seq_len=64)
    after = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_step_in_another_thread_is_left_alone():
    """Plans run one after another while a model with loops of every kind trains beside them."""
    cut = {"q_bucket_size": 16, "k_bucket_size": 16, "head_chunks": 4, "ff_chunks": 16, "loss_chunk_size": 16}
    model = Transformer(max_seq_len=64, **CONFIG, **cut, backend="tiled")
    tokens = torch.randint(256, (1, 64))

    def gradients():
        return torch.autograd.grad(model(tokens, labels=tokens), list(model.parameters()))

    expected, found, planning = gradients(), [], threading.Event()
    planning.set()

    def train():
        while planning.is_set() or not found:
            found.append(gradients())

    thread = threading.Thread(target=train)
    thread.start()
    try:
        while len(found) < 3 and thread.is_alive():
            for device in ("cpu", "cuda"):
                planned({**CONFIG, **cut}, device=device, autocast="bf16")
    finally:
        planning.clear()
        thread.join()
    assert len(found) > 2
    for step in found:
        assert all(torch.equal(one, other) for one, other in zip(step, expected, strict=True))


def test_half_the_bytes_in_half_the_precision():
    full, half = (planned(dtype=dtype).breakdown["parameters"] for dtype in ("fp32", torch.bfloat16))
    assert full == 2 * half


def test_a_budget_picks_the_fastest_settings_that_fit():
    everything = planned(budget="1GiB")
    assert everything.options[0].name == "store everything"
    assert everything.settings["reversible"] is False
    assert len(everything.options) == 1
    tight = planned(budget=everything.peak_bytes // 2)
    assert tight.fits()
    assert not any(option.peak_bytes <= tight.budget for option in tight.options[:-1])
    assert tight.settings == tight.options[-1].settings
    assert tight.settings["reversible"] is True
    assert [option.flops for option in tight.options] == sorted(option.flops for option in tight.options)
    assert planned({**CONFIG, **tight.settings}).peak_bytes == tight.peak_bytes


def test_what_the_configuration_says_is_kept():
    tight = planned({**CONFIG, "reversible": False}, budget="14MiB")
    assert "reversible" not in tight.settings
    pinned = {**CONFIG, "reversible": True, "ff_chunks": 2, "head_chunks": 2, "loss_chunk_size": 64, "exact": False}
    pinned["keep_attention"] = True
    assert [settings for _, settings in ways(pinned, 1, 2048, mixed_precision=False)] == [{}]


def test_reversal_that_was_asked_for_is_exact_under_mixed_precision_in_every_candidate():
    reversible = ways({**CONFIG, "reversible": True}, 1, 2048, mixed_precision=True)
    assert reversible[0][0] == "reversible, in one piece"
    assert all(settings["exact"] is True for _, settings in reversible)
    stored = ways({**CONFIG, "reversible": False}, 1, 2048, mixed_precision=True)
    assert all(settings["exact"] is False for _, settings in stored)


@pytest.mark.parametrize(
    ("changes", "offload", "expected"),
    [
        ({}, False, [(False, False), (True, True), (True, False)]),
        ({}, True, [(False, False), (True, True), (True, "cpu"), (True, False)]),
        ({"reversible": True}, True, [(None, True), (None, "cpu"), (None, False)]),
        ({"reversible": False}, True, [(None, False)]),
        ({"keep_attention": "cpu"}, True, [(False, None), (True, None)]),
        ({"keep_attention": False}, True, [(False, None), (True, None)]),
        ({"backend": "naive"}, True, [(False, False), (True, False)]),
    ],
    ids=str,
)
def test_attention_is_kept_before_it_is_computed_again(changes, offload, expected):
    found = ways({**CONFIG, **changes}, 1, 2048, mixed_precision=False, offload=offload)
    kept = [(settings.get("reversible"), settings.get("keep_attention")) for _, settings in found]
    assert list(dict.fromkeys(kept)) == expected
    names = [name for name, _ in found]
    assert ("reversible with attention kept" in names) == (changes.get("keep_attention") == "cpu" or changes == {})
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_candidates_lead_from_fast_to_lean(device):
    config, options = {**CONFIG, "depth": 4}, {"device": device, "autocast": "bf16"}
    found = [settings for _, settings in ways(config, 1, 2048, mixed_precision=True, offload=device == "cuda")]
    places = [i for i, settings in enumerate(found) if settings["reversible"]][: 2 + (device == "cuda")]
    stored, *reversible = (planned({**config, **found[i]}, **options) for i in (places[0] - 1, *places))
    assert [made.peak_bytes for made in (stored, *reversible)] == sorted(
        (made.peak_bytes for made in (stored, *reversible)), reverse=True
    )
    kept, *others, again = reversible
    assert stored.flops < kept.flops < again.flops
    assert all(other.flops == kept.flops for other in others)
    assert all(other.peak_bytes == again.peak_bytes for other in others), "what waits on the host takes nothing here"


def test_a_budget_between_has_attention_kept():
    config = {**CONFIG, "depth": 6}
    kept = planned({**config, "reversible": True, "keep_attention": True, "ff_chunks": 8}).peak_bytes
    made = planned(config, budget=kept)
    assert made.options[-1].name == "reversible with attention kept"
    assert made.settings["keep_attention"] is True
    leaner = planned(config, budget=kept - 1)
    assert [option.name for option in leaner.options[-2:]] == ["reversible with attention kept", "reversible blocks"]
    assert leaner.settings["keep_attention"] is False


def test_a_cuda_device_has_host_memory_to_keep_attention_in():
    config = {**CONFIG, "depth": 6, "reversible": True}
    kept = planned({**config, "keep_attention": True, "ff_chunks": 8}, device="cuda").peak_bytes
    made = planned(config, budget=kept - 1, device="cuda")
    assert made.options[-1].name == "attention kept in host memory"
    assert made.settings["keep_attention"] == "cpu"


def test_a_batch_of_short_sequences_has_chunks_too():
    names = [name for name, _ in ways(CONFIG, 32, 64, mixed_precision=False)]
    assert "feed-forward in 8 chunks" in names


def test_what_saves_nothing_is_not_chosen():
    """Whatever the peak is about, more of what does not lower it costs time alone."""
    config = {**CONFIG, "num_tokens": 4096, "depth": 1, "heads": 4}
    made = planned(config, seq_len=256, budget="1MiB")
    peaks = [option.peak_bytes for option in made.options]
    assert peaks == sorted(set(peaks), reverse=True)
    names = [name for name, _ in ways(config, 1, 256, mixed_precision=False)]
    considered = [option.name for option in made.options if option.name in names]
    passed_over = set(names) - set(considered)
    assert passed_over, "the loss takes the most here, with or without head groups"
    assert considered == [name for name in names if name in considered]
    assert made.settings == made.options[-1].settings
    assert made.remedies["budget"] == made.peak_bytes


def test_gradients_that_are_freed_between_steps_come_into_being_in_backward():
    kept, freed = (planned(depth_of(5), keep_gradients=keep).timeline for keep in (True, False))
    assert freed.breakdown(0)["gradients"] == 0 < kept.breakdown(0)["gradients"]
    assert freed.breakdown(-1)["gradients"] == kept.breakdown(-1)["gradients"]
    assert freed.totals[0] == kept.totals[0] - kept.breakdown(0)["gradients"] - allocator_difference(kept, freed)
    assert freed.totals.max() < kept.totals.max()


def depth_of(depth):
    return {**CONFIG, "depth": depth}


def allocator_difference(one, other):
    return one.breakdown(0)["allocator"] - other.breakdown(0)["allocator"]


def test_an_optimizer_made_by_a_function_goes_tensor_by_tensor_on_the_cpu_and_all_at_once_on_cuda():
    def make(parameters):
        return torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0}])

    for device in ("cpu", "cuda"):
        by_function, by_name = (planned(optimizer=choice, device=device) for choice in (make, "adamw"))
        foreach = [op for op in by_function.timeline.operations if "foreach" in op.name and op.phase == "optimizer"]
        assert bool(foreach) == (device == "cuda")
        assert by_function.breakdown["optimizer"] == pytest.approx(by_name.breakdown["optimizer"], rel=0.01)


def test_reversal_under_mixed_precision_is_exact():
    settings = planned(budget="16MiB", autocast="bf16").settings
    assert settings["reversible"] is True
    assert settings["exact"] is True


@pytest.mark.slow
def test_what_does_not_fit_comes_with_advice_that_holds():
    lean = {**CONFIG, "depth": 1, "reversible": True, "ff_chunks": 16, "head_chunks": 4, "loss_chunk_size": 64}
    hopeless = planned(lean, batch_size=4, seq_len=2048, budget="14MiB")
    assert not hopeless.fits()
    words = hopeless.advice.split()
    batch, length = (int(words[words.index(name) + 2].replace(",", "")) for name in ("batch", "sequences"))
    assert planned(lean, batch_size=batch, seq_len=2048).fits("14MiB")
    assert planned(lean, batch_size=4, seq_len=length).fits("14MiB")
    assert hopeless.remedies == {"batch_size": batch, "seq_len": length, "budget": hopeless.peak_bytes}
    tiny = planned(budget="1MiB")
    assert "parameters, gradients and optimizer state alone take" in tiny.advice


@pytest.mark.slow
def test_where_neither_batch_nor_length_helps_a_smaller_depth_may():
    deep = {**CONFIG, "depth": 60}
    refused = planned(deep, seq_len=64, budget=planned(depth_of(20), seq_len=64).peak_bytes)
    assert set(refused.remedies) == {"depth", "budget"}
    assert planned(depth_of(refused.remedies["depth"]), seq_len=64, budget=refused.budget).fits()
    assert 15 < refused.remedies["depth"] < 30


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_generation_holds_the_cache_and_neither_gradients_nor_optimizer(kv_heads, device):
    config = {**CONFIG, "depth": 5, "kv_heads": kv_heads, "positions": "rotary"}
    made = planned(config, seq_len=1000, training=False, device=device)
    last = made.timeline.breakdown(-1)
    # Keys and values of 1001 tokens, in buffers with room for twice the prompt.
    assert last["attention"] >= 5 * 2 * (2 * 1000) * kv_heads * CONFIG["dim_head"] * 4
    assert last["attention"] < 1.2 * 5 * 2 * (2 * 1000) * kv_heads * CONFIG["dim_head"] * 4
    assert made.breakdown["gradients"] == made.breakdown["optimizer"] == 0
    assert {operation.phase for operation in made.timeline.operations} == {"forward", "next token"}
    assert made.peak_bytes < planned(config, seq_len=1000, device=device).peak_bytes + last["attention"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a positive integer, got 0"),
        ({"seq_len": -5}, "seq_len: expected a positive integer, got -5"),
        ({"seq_len": None}, "seq_len: expected a positive integer, got None"),
        ({"budget": "8 gigs"}, "budget: expected a size above zero such as 8GB"),
        ({"dtype": "int8"}, "dtype: expected a floating-point"),
        ({"dtype": torch.int64}, "dtype: expected a floating-point"),
        ({"device": "tpu9"}, "device: expected cpu, cuda"),
        ({"device": "meta"}, "device: expected a device with memory"),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw"),
        ({"threads": 0}, "threads: expected a positive integer, got 0"),
        ({"example_inputs": torch.zeros(1, 2)}, "example_inputs: expected None beside a Transformer's keywords"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        planned(**changes)


def test_nonsense_in_the_model_is_refused():
    with pytest.raises(ValueError, match="model_or_config: expected a Transformer's keywords"):
        plan(7, batch_size=1, seq_len=1)
    with pytest.raises(ValueError, match=r"model_or_config: .*dimension"):
        planned({**CONFIG, "dimension": 5})
    with pytest.raises(ValueError, match="depth: expected a positive integer, got None"):
        planned({"num_tokens": 4, "dim": 4})
    with pytest.raises(ValueError, match="example_inputs: expected the inputs"):
        plan(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="loss_fn: expected a function that turns"):
        plan(nn.Linear(2, 2), example_inputs=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="budget: expected a size such as 8GiB"):
        planned().fits()


@pytest.mark.parametrize("wrong", [{"kv_heads": 4}, {"kv_heads": 3}, {"heads": 0}, {"heads": 2.0}])
def test_a_budget_does_not_hide_what_is_wrong(wrong):
    """The numbers of pieces are computed from keywords."""
    config = {**CONFIG, "heads": 2, **wrong}
    said = []
    for budget in (None, "1GiB"):
        with pytest.raises(ValueError, match=r"heads: expected a (divisor|positive)") as raised:
            planned(config, budget=budget)
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_a_backend_that_keeps_for_itself_is_planned_without_keeping():
    config = {**CONFIG, "backend": "sdpa", "depth": 6}
    assert not planned(config, budget="16MiB").settings.get("keep_attention")


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_step_is_planned_where_gradients_are_off(without):
    expected = planned(seq_len=100)
    with without():
        assert planned(seq_len=100).peak_bytes == expected.peak_bytes
        assert not torch.is_grad_enabled()
