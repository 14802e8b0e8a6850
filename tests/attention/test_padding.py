"""Keys before the first and after the last that padding leaves are not computed, and nothing else changes."""

import pytest
import torch

from memory_efficient_attention_pytorch import dot_product_attention
from memory_efficient_attention_pytorch.attention.visibility import Block, Visibility
from tests.agreement import skip_unless_usable

N = 300
BUCKETS = {"q_bucket_size": 96, "k_bucket_size": 112}
SEEN = [(0, 130), (70, 300), (70, 201), (64, 256), (200, 201), (0, 0)]


def padding(*seen):
    """One sequence's keys in a row, True from the first to the last that is seen."""
    return torch.stack([(torch.arange(N) >= first) & (torch.arange(N) < last) for first, last in seen])


def attend(mask, seed=3, **options):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(len(mask), 2, N, 32, requires_grad=True) for _ in range(3))
    out, lse = dot_product_attention(
        q, k, v, mask=mask, q_bucket_size=96, k_bucket_size=112, return_lse=True, **options
    )
    # Weights that do not sum to 0: where one key is seen its value's gradient is their sum, else of rounding alone.
    out.mul(torch.linspace(-1, 2, N)[:, None]).sum().backward()
    return out, lse, q.grad, k.grad, v.grad


@pytest.mark.parametrize("seen", [(one,) for one in SEEN] + [((70, 201), (130, 230))], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 90}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("backend", ["products", "cpu_kernel", "onednn"])
def test_the_result_is_that_of_a_mask_of_queries_and_keys(seen, options, backend):
    skip_unless_usable(backend)
    if "dropout" in options and backend == "cpu_kernel":
        pytest.skip("it has no dropout")
    mask = padding(*seen)
    whole = mask[:, None, None].repeat(1, 1, N, 1)  # taken for any mask, whose tiles are all computed or left out
    for found, expected in zip(
        attend(mask, backend=backend, **options), attend(whole, backend=backend, **options), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def area(rows):
    return {(i, j) for row in rows for t in row.tiles for i in range(t.i0, t.i1) for j in range(t.j0, t.j1)}


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_have_the_keys_that_are_seen(causal):
    mask = padding((70, 201), (130, 230))
    assert mask.shape == (2, N)
    visibility = Visibility.build((2, 1, N, N), mask.device, mask, causal)
    rows = visibility.schedule(96, 112, mask.device)
    tiles = [tile for row in rows for tile in row.tiles]
    assert {(tile.j0, tile.j1) for tile in tiles if tile.i0 == 288} == {(64, 112), (112, 224), (224, 256)}
    assert all(tile.j0 < tile.j1 for tile in tiles)
    # Every score that is seen is in a tile.
    seen = {(i, j) for i in range(N) for j in range(70, 230) if j <= i or not causal}
    assert seen <= area(rows)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_have_the_same_tiles_cut(causal):
    mask = padding((70, 201))
    visibility = Visibility.build((1, 1, N, N), mask.device, mask, causal)
    halves = slice(0, 150), slice(150, N)
    blocks = [Block(slice(0, 1), queries, keys) for queries in halves for keys in halves]
    of_blocks = [area(visibility.schedule(96, 112, mask.device, block)) for block in blocks]
    assert set().union(*of_blocks) == area(visibility.schedule(96, 112, mask.device))
    for block, cut in zip(blocks, of_blocks, strict=True):
        assert all(i in range(N)[block.queries] and j in range(N)[block.keys] for i, j in cut)


def test_fully_hidden_rows_have_no_tiles():
    mask = padding((0, 0))
    assert Visibility.build((1, 1, N, N), mask.device, mask).schedule(96, 112, mask.device) == []
