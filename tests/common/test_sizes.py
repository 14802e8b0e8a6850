"""Sizes are read as people write them, nonsense is refused, and what memory there is comes from the system."""

import pytest
import torch

from memory_efficient_attention_pytorch.common import sizes
from memory_efficient_attention_pytorch.common.sizes import available_memory, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8000M", 8 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("64KiB", 2**16),
        (".5T", 5 * 10**11),
        ("4096", 4096),
        (4096, 4096),
        ("100b", 100),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "8XB", "-3G", 0, "0GB", -1, "8i", "nan", float("nan"), float("inf"), True, None])
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError, match="memory-budget: expected a size above zero such as 8GB, 8GiB or 8000M"):
        parse_size(text, "memory-budget")


def test_sizes_are_written():
    assert [format_size(n) for n in (0, 1023, 1536, 150 * 2**20, 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "150 MiB",
        "1 TiB",
    ]


def test_control_groups_bound_what_is_available(monkeypatch):
    free = available_memory()
    assert 0 < free < 2**50
    monkeypatch.setattr(sizes, "_control_group_rooms", lambda: [1000])
    assert available_memory("cpu") == 1000


def test_an_unknown_device_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine's CUDA device does tell")
    with pytest.raises(NotImplementedError, match="give a budget"):
        available_memory("cuda")
