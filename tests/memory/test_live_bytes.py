"""The counter itself, against sums done by hand."""

import torch

from tests.memory.live_bytes import LiveBytes, saved_bytes

KIB = 1024


def test_counts_bytes_from_making_to_freeing():
    with LiveBytes() as count:
        a = torch.zeros(256)
        b = a + 1
        assert count.live == 2 * KIB
        del a
        assert count.live == KIB
        view = b[10:].reshape(-1)
        assert count.live == KIB
        del b
        assert count.live == KIB, "a view keeps its storage"
        del view
    assert count.live == 0
    assert count.peak == 2 * KIB
    assert count.largest == KIB


def test_storages_from_before_are_not_counted():
    before = torch.zeros(256)
    with LiveBytes() as count:
        before.add_(1)
        before.view(16, 16).mul_(2)
    assert count.peak == 0
    assert count.calls["add_"] == count.calls["mul_"] == 1


def test_backward_is_counted_too():
    x = torch.randn(64, 64, requires_grad=True)
    with LiveBytes() as count:
        (x @ x).sum().backward()
    assert count.products == 3
    assert count.live == 64 * 64 * 4, "only the gradient is left"


def test_saved_bytes_counts_a_storage_once():
    x = torch.randn(256, requires_grad=True)
    assert saved_bytes(lambda: x * x) == KIB
    assert saved_bytes(lambda: x * 2) == 0
