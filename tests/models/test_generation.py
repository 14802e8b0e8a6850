"""Training on the next token, and generation: where it ends, and what the network is shown."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memory_efficient_attention_pytorch import Attention, AutoregressiveWrapper, Transformer
from memory_efficient_attention_pytorch.models.generation import pad_left

SHAPE = {"num_tokens": 17, "max_seq_len": 12, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "causal": True}
LEARNED, SLIDING, WINDOWED = {}, {"positions": "rotary"}, {"positions": "rotary", "window": (4, 0)}
VARIANTS = {
    "learned": LEARNED,
    "rotary": SLIDING,
    "alibi": {"positions": "alibi"},
    "none": {"positions": "none", "kv_heads": 1},
    "window": WINDOWED,
    "learned-window": {"window": (4, 0)},
}


def make(**kwargs) -> Transformer:
    """In fp64, where no two ways of computing differ by enough to draw another token."""
    model = Transformer(**{**SHAPE, **kwargs}).double().eval()
    # Sharper than at initialisation, so that a wrong context shows in the tokens.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(5.0 if ".fn.to_" in name else 1.0)
    return model


def prompts(rows=3, tokens=5):
    return torch.randint(SHAPE["num_tokens"], (rows, tokens))


@torch.no_grad()
def greedy(model, tokens, count, context=None):
    """The likeliest tokens, the network reading the last ``context`` tokens (None: all) anew for each."""
    start = tokens.shape[1]
    for _ in range(count):
        read = tokens if context is None else tokens[:, -context:]
        tokens = torch.cat([tokens, model(read)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, start:]


class Successor(nn.Module):
    """A network from elsewhere: sure of token t + 1 after token t. Notes what it is shown."""

    max_seq_len = 6

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, x, temperature_of_room=20):
        self.shown.append((x.tolist(), temperature_of_room))
        return 50.0 * F.one_hot((x + 1) % 100, 100)


# Training


def test_loss_is_that_of_the_next_token():
    model, x = make(), prompts(2, 9)
    expected = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(AutoregressiveWrapper(model)(x), expected)


def test_loss_of_padded_rows_counts_their_tokens_alone():
    model, x = make(), prompts(2, 9)
    mask = torch.arange(9) >= torch.tensor([[3], [0]])
    each = [F.cross_entropy(model(row[None, :-1]).flatten(0, 1), row[1:], reduction="sum") for row in (x[0, 3:], x[1])]
    torch.testing.assert_close(AutoregressiveWrapper(model)(x, mask=mask), sum(each) / (5 + 8))


def test_loss_passes_keywords_on():
    model, x = make(), prompts(2, 9)
    ignoring = AutoregressiveWrapper(model)(x, ignore_index=int(x[0, 1]))
    labels = x[:, 1:].flatten()
    torch.testing.assert_close(
        ignoring, F.cross_entropy(model(x[:, :-1]).flatten(0, 1), labels, ignore_index=int(x[0, 1]))
    )


@pytest.mark.parametrize("shape", [(5,), (2, 1), (2, 3, 4)])
def test_loss_needs_two_tokens(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, tokens\) with two tokens or more"):
        AutoregressiveWrapper(make())(torch.zeros(shape, dtype=torch.long))


# What comes out


def test_new_tokens_alone():
    out = AutoregressiveWrapper(make()).generate(prompts(), 6)
    assert out.shape == (3, 6)
    assert out.dtype == torch.int64
    assert out.min() >= 0
    assert out.max() < SHAPE["num_tokens"]


def test_nothing_asked_nothing_made():
    assert AutoregressiveWrapper(make()).generate(prompts(), 0).shape == (3, 0)


def test_stream_is_generate_step_by_step():
    wrapper, start = AutoregressiveWrapper(make()), prompts()
    torch.manual_seed(1)
    whole = wrapper.generate(start, 6, temperature=0.7)
    torch.manual_seed(1)
    steps = list(wrapper.stream(start, 6, temperature=0.7))
    assert [step.shape for step in steps] == [(3,)] * 6
    assert torch.stack(steps, dim=1).equal(whole)


def test_tokens_can_be_trained_on():
    """They are ordinary tensors: what inference mode makes cannot be kept for a backward pass."""
    model, start = make(), prompts()
    AutoregressiveWrapper(model)(torch.cat([start, AutoregressiveWrapper(model).generate(start, 4)], dim=1)).backward()
    assert model.token_emb.weight.grad.abs().sum() > 0


def test_a_row_ends_with_its_eos_and_the_others_go_on():
    start = torch.tensor([[10, 1], [20, 4], [30, 9]])
    out = AutoregressiveWrapper(Successor(), pad_value=-1).generate(start, 4, eos_token=5)
    assert out.tolist() == [[2, 3, 4, 5], [5, -1, -1, -1], [10, 11, 12, 13]]


def test_generation_ends_with_the_last_row():
    out = AutoregressiveWrapper(Successor(), pad_value=7).generate(torch.tensor([[1], [3]]), 50, eos_token=5)
    assert out.tolist() == [[2, 3, 4, 5], [4, 5, 7, 7]]


def test_an_eos_in_the_prompt_is_no_end():
    out = AutoregressiveWrapper(Successor()).generate(torch.tensor([[5, 5], [5, 2]]), 4, eos_token=5)
    assert out.tolist() == [[6, 7, 8, 9], [3, 4, 5, 0]]


def test_padding_is_never_shown_to_the_net():
    net = Successor()
    AutoregressiveWrapper(net, pad_value=-100).generate(torch.tensor([[1], [4]]), 4, eos_token=5)
    assert all(0 <= token < 100 for shown, _ in net.shown for row in shown for token in row)


# Chance


def test_a_generator_decides_alone():
    wrapper, start = AutoregressiveWrapper(make()), prompts()
    before = torch.get_rng_state()
    first, second = (wrapper.generate(start, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.equal(second)
    assert torch.get_rng_state().equal(before)
    assert not wrapper.generate(start, 8, generator=torch.Generator().manual_seed(4)).equal(first)


def test_rows_with_generators_of_their_own_do_not_depend_on_the_others():
    wrapper, start = AutoregressiveWrapper(make()), prompts(3)

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = wrapper.generate(start, 10, generator=seeded(1, 2, 1))
    for row, seed in enumerate((1, 2, 1)):
        assert wrapper.generate(start[row : row + 1], 10, generator=seeded(seed)).equal(together[row : row + 1])


# What the network is shown


@pytest.mark.parametrize("variant", VARIANTS)
def test_up_to_max_seq_len_the_cache_changes_nothing(variant):
    model, start = make(**VARIANTS[variant]), prompts(3, 4)
    wrapper = AutoregressiveWrapper(model)
    cached = wrapper.generate(start, 9, temperature=0)
    assert cached.equal(greedy(model, start, 9))
    assert cached.equal(wrapper.generate(start, 9, temperature=0, use_cache=False))


def test_learned_positions_read_the_last_tokens_anew():
    model, start = make(), prompts(2, 7)
    wrapper = AutoregressiveWrapper(model)
    assert wrapper.beyond_max_seq_len == "recompute"
    for prompt in (start, prompts(2, 12), prompts(2, 30)):
        out = wrapper.generate(prompt, 20, temperature=0)
        assert out.equal(greedy(model, prompt, 20, context=12))
        assert out.equal(wrapper.generate(prompt, 20, temperature=0, use_cache=False))


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
def test_relative_positions_slide(positions):
    model, start = make(positions=positions), prompts(2, 7)
    wrapper = AutoregressiveWrapper(model)
    assert wrapper.beyond_max_seq_len == "slide"
    out = wrapper.generate(start, 40, temperature=0)
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.window = (11, 0)
    assert out.equal(greedy(model, start, 40)), "each token sees the last 12, as with a window"


def test_a_longer_prompt_counts_with_its_last_tokens():
    wrapper, start = AutoregressiveWrapper(make(**SLIDING)), prompts(2, 30)
    out = wrapper.generate(start, 8, temperature=0)
    assert out.equal(wrapper.generate(start[:, -12:], 8, temperature=0))


def test_a_window_goes_on():
    model, start = make(**WINDOWED), prompts(2, 30)
    wrapper = AutoregressiveWrapper(model)
    assert wrapper.beyond_max_seq_len == "window"
    out = wrapper.generate(start, 30, temperature=0)
    assert out.equal(greedy(model, start, 30))
    assert out.equal(wrapper.generate(start, 30, temperature=0, use_cache=False))


def test_a_window_with_learned_positions_ends_with_them():
    model, start = make(window=(4, 0)), prompts(2, 7)
    wrapper = AutoregressiveWrapper(model)
    assert wrapper.beyond_max_seq_len == "recompute"
    assert wrapper.generate(start, 20, temperature=0).equal(greedy(model, start, 20, context=12))


def test_a_net_from_elsewhere_reads_everything_anew():
    net = Successor()
    out = AutoregressiveWrapper(net).generate(torch.tensor([[1, 2, 3, 4]]), 5, temperature_of_room=15)
    assert out.tolist() == [[5, 6, 7, 8, 9]]
    shown = [([list(range(max(1, last - 5), last + 1))], 15) for last in range(4, 9)]
    assert net.shown == shown, "at most max_seq_len tokens at a time, and the further keywords"


def test_a_net_that_is_not_causal_is_not_cached():
    """A new token changes the keys of those before it there."""
    model, start, lengths = make(causal=False), prompts(2, 4), []
    expected = greedy(model, start, 8)
    model.token_emb.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    assert AutoregressiveWrapper(model).generate(start, 8, temperature=0).equal(expected)
    assert lengths == list(range(4, 12))


def test_each_token_is_read_once():
    model, lengths = make(**SLIDING), []
    model.token_emb.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    AutoregressiveWrapper(model).generate(prompts(2, 5), 30)
    assert lengths == [5] + [1] * 29


# Prompts of unequal lengths


def ragged(lengths, pad_value=0):
    rows = [torch.randint(SHAPE["num_tokens"], (length,)).tolist() for length in lengths]
    return rows, *pad_left(rows, pad_value)


def test_pad_left():
    tokens, mask = pad_left([[5, 6, 7], [8]], pad_value=9)
    assert tokens.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [(3, 1, 8), (12, 2, 25)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_is_what_it_is_alone(variant, lengths, sampled):
    """Also beyond max_seq_len, which each row comes to at its own time."""
    wrapper = AutoregressiveWrapper(make(**VARIANTS[variant]))
    rows, tokens, mask = ragged(lengths, pad_value=-5)

    def options(*seeds):
        return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]} if sampled else {"temperature": 0}

    together = wrapper.generate(tokens, 18, mask=mask, **options(0, 1, 2))
    for row, prompt in enumerate(rows):
        alone = wrapper.generate(torch.tensor([prompt]), 18, **options(row))
        assert together[row].tolist() == alone[0].tolist()


def test_a_mask_that_hides_nothing_needs_no_net_that_takes_one():
    start = torch.tensor([[1, 2], [3, 4]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert AutoregressiveWrapper(Successor()).generate(start, 2, mask=mask).tolist() == [[3, 4], [5, 6]]


# Modes and errors


def modes(module):
    return [m.training for m in module.modules()]


def test_eval_mode_during_a_step_and_every_mode_back_after_it():
    """Also for an iterator that nobody reads to its end, and where a part had another mode than the whole."""
    model = make(dropout=0.5).train()
    model.layers[0].eval()
    before, during = modes(model), []
    model.register_forward_pre_hook(lambda *_: during.append(any(modes(model))))
    wrapper = AutoregressiveWrapper(model)
    steps = wrapper.stream(prompts(), 5)
    next(steps)
    assert modes(model) == before
    next(steps)
    assert modes(model) == before
    assert during == [False, False]
    model.eval()
    next(steps)
    assert not any(modes(model))


@pytest.mark.parametrize("training", [True, False])
def test_every_mode_back_after_an_exception(training):
    model = make().train(training)
    model.layers.register_forward_pre_hook(lambda *_: 1 / 0)
    before = modes(model)
    with pytest.raises(ZeroDivisionError):
        AutoregressiveWrapper(model).generate(prompts(), 3)
    assert modes(model) == before


def test_gradients_are_off_during_a_step_alone():
    model, enabled = make(), []
    model.register_forward_pre_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    steps = AutoregressiveWrapper(model).stream(prompts(), 2)
    next(steps)
    assert enabled == [False]
    assert torch.is_grad_enabled()


ERRORS = {
    "one dimension": ({"start_tokens": torch.tensor([1, 2])}, r"start_tokens: expected integers of shape \(batch"),
    "no token": (
        {"start_tokens": torch.zeros(2, 0, dtype=torch.long)},
        r"at least one token, got torch.int64 \(2, 0\)",
    ),
    "floats": ({"start_tokens": torch.zeros(2, 3)}, r"start_tokens: .*got torch.float32 \(2, 3\)"),
    "seq_len": ({"seq_len": -1}, "seq_len: expected an integer of at least 0, got -1"),
    "seq_len 1.5": ({"seq_len": 1.5}, "seq_len: expected an integer of at least 0, got 1.5"),
    "complex tokens": (
        {"start_tokens": torch.zeros(2, 3, dtype=torch.complex64)},
        "start_tokens: .* got torch.c",
    ),
    "temperature": ({"temperature": -0.1}, "temperature: expected a finite number of at least 0, got -0.1"),
    "temperature nan": ({"temperature": math.nan}, "temperature: .* got nan"),
    "temperature inf": ({"temperature": math.inf}, "temperature: .* got inf"),
    "filter_thres": ({"filter_thres": 1.1}, "filter_thres: expected a number from 0 to 1, got 1.1"),
    "top_k": ({"top_k": 0}, "top_k: expected a positive integer, got 0"),
    "top_p": ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
    "top_p nan": ({"top_p": math.nan}, "top_p: .* got nan"),
    "generators": ({"generator": [torch.Generator()]}, "generator: expected one for each of 2 rows, got 1"),
    "mask's shape": (
        {"mask": torch.ones(2, 4, dtype=torch.bool)},
        r"mask: expected bool of start_tokens's shape \(2, 3",
    ),
    "mask's dtype": ({"mask": torch.ones(2, 3)}, r"mask: .* got torch.float32 \(2, 3\)"),
    "right padding": ({"mask": torch.tensor([[True, True, False]] * 2)}, "mask: expected padding .* only on the left"),
    "no token in a row": ({"mask": torch.tensor([[True] * 3, [False] * 3])}, "mask: .* before at least one token"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_named_at_once(name):
    wrong, message = ERRORS[name]
    arguments = {"start_tokens": torch.zeros(2, 3, dtype=torch.long), "seq_len": 4, **wrong}
    with pytest.raises(ValueError, match=message):
        AutoregressiveWrapper(make()).stream(**arguments)


def test_padding_needs_a_net_that_takes_a_mask():
    with pytest.raises(ValueError, match="mask: expected none, since the net's forward takes no mask"):
        AutoregressiveWrapper(Successor()).stream(torch.ones(1, 2).long(), 2, mask=torch.tensor([[False, True]]))


def test_no_prompts_to_pad():
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        pad_left([])
