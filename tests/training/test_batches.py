import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_efficient_attention_pytorch.training.config import TrainConfig
from memory_efficient_attention_pytorch.training.data import Batches, evaluation_starts, permute


@given(st.integers(min_value=1, max_value=3000), st.integers(min_value=0, max_value=1 << 32))
def test_permute_is_a_permutation(size, seed):
    keys = np.random.default_rng(seed).integers(0, 1 << 63, size=4, dtype=np.uint64)
    assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))


def test_permute_depends_on_its_keys_and_mixes():
    one, other = (np.random.default_rng(s).integers(0, 1 << 63, size=4, dtype=np.uint64) for s in (0, 1))
    first, second = permute(np.arange(5000), 5000, one), permute(np.arange(5000), 5000, other)
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(np.arange(5000), first.astype(float))[0, 1]) < 0.1
    assert (np.diff(first.astype(int)) == 1).mean() < 0.01


def test_permute_reaches_beyond_32_bits():
    size = (1 << 40) + 7
    keys = np.random.default_rng(0).integers(0, 1 << 63, size=4, dtype=np.uint64)
    value = permute(np.array([0, 1, size - 1]), size, keys)
    assert len(set(value.tolist())) == 3
    assert (value < size).all()
    assert value.max() > 1 << 32


def batches(count=1000, **options):
    return Batches(np.arange(count, dtype=np.uint16), TrainConfig(seq_len=8, batch_size=4, **options))


def test_labels_are_the_tokens_that_follow():
    ((x, labels),) = batches()(0)
    assert x.shape == labels.shape == (4, 8)
    assert x.dtype == labels.dtype == torch.int64
    assert torch.equal(labels, x + 1)


def test_batches_follow_from_seed_and_step_alone():
    once, again = batches(), batches()
    assert all(torch.equal(a, b) for s in (5, 3) for (a, _), (b, _) in zip(once(s), again(s), strict=True))
    assert not torch.equal(next(once(3))[0], next(once(4))[0])
    assert not torch.equal(next(once(3))[0], next(batches(seed=1)(3))[0])


def test_a_pass_shows_every_window_once_and_the_next_cuts_elsewhere():
    data = batches()
    first, second = (np.sort(data.starts(np.arange(n * data.count, (n + 1) * data.count))) for n in (0, 1))
    assert (np.diff(first) == 8).all()
    assert (np.diff(second) == 8).all()
    assert first[0] != second[0]
    assert max(first[-1], second[-1]) + 9 <= 1000


@pytest.mark.parametrize("count", [9, 10, 17, 24, 25])
def test_short_texts_give_windows_that_lie_within(count):
    data = batches(count)
    starts = data.starts(np.arange(500))
    assert starts.min() >= 0
    assert starts.max() + 9 <= count


def test_the_global_batch_does_not_depend_on_how_it_is_divided():
    def windows(accumulation, processes, size, step=7):
        config = TrainConfig(seq_len=8, batch_size=size, accumulation=accumulation)
        tokens = np.arange(1000, dtype=np.uint16)
        parts = [Batches(tokens, config, processes, process) for process in range(processes)]
        return sorted(x[i, 0].item() for part in parts for x, _ in part(step) for i in range(size))

    whole = windows(1, 1, 12)
    assert len(set(whole)) == 12
    assert windows(3, 1, 4) == windows(1, 3, 4) == windows(2, 3, 2) == whole


@pytest.mark.parametrize(("count", "windows", "length"), [(2, 1, 1), (9, 1, 8), (33, 4, 8), (1000, 6, 8)])
def test_the_validation_set_is_fixed_and_lies_within(count, windows, length):
    config = TrainConfig(seq_len=8, evaluation_windows=6)
    tokens = np.zeros(count, dtype=np.uint8)
    starts, found_length = evaluation_starts(tokens, config)
    assert (len(starts), found_length) == (windows, length)
    assert len(set(starts.tolist())) == windows
    assert starts[0] == 0
    assert starts[-1] + length + 1 <= count
