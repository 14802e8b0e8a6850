"""Products through oneDNN and through MKL: the same numbers, in any layout, and no memory that grows."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memory_efficient_attention_pytorch.common import products
from memory_efficient_attention_pytorch.common.products import add_product, linear_into
from tests.memory.live_bytes import LiveBytes

SHAPES = [
    (512, 512, 2048),
    (1000, 300, 100),
    (640, 256, 64),
    (64, 4096, 70),
    (7, 512, 512),
    (512, 8, 512),
    (0, 512, 64),
]


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def library(request, monkeypatch):
    """Both paths run on every CPU: the choice alone depends on it."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    return request.param


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item() if expected.numel() else 0.0


def layouts(matrix):
    rows, columns = matrix.shape
    wide = torch.zeros(rows, columns + 5, dtype=matrix.dtype)
    wide[:, :columns] = matrix
    return {
        "dense": matrix,
        "transposed": matrix.t().contiguous().t(),
        "rows with gaps": wide[:, :columns],
        "columns with gaps": wide.t().contiguous().t()[:, :columns],
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_into(library, shape):
    n, k, j = shape
    x, w, bias = torch.randn(n, k), torch.randn(j, k), torch.randn(j)
    for layout, weight in layouts(w).items():
        for values in layouts(x).values():
            for b in (None, bias):
                out = torch.full((n, j), torch.nan)
                assert linear_into(out, values, weight, b) is out
                truth = x.double() @ w.double().t() + (0 if b is None else b.double())
                assert error(out, truth) < 1e-6 * k**0.5, layout


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_product(library, shape):
    n, i, j = shape[0], shape[2], shape[1]
    left, right, start = torch.randn(n, i), torch.randn(n, j), torch.randn(i, j)
    truth = start.double() + left.double().t() @ right.double()
    for first in layouts(left).values():
        for layout, second in layouts(right).items():
            whole = torch.zeros(i + 2, j + 3)
            total = whole[1:-1, 2:-1]
            total.copy_(start)
            add_product(total, first, second)
            assert error(total, truth) < 1e-6 * max(n, 1) ** 0.5, layout
            assert whole[0].count_nonzero() == whole[-1].count_nonzero() == whole[:, :2].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_pytorch(library, dtype):
    x, w = torch.randn(512, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
    total = torch.zeros(512, 512, dtype=torch.promote_types(dtype, torch.float32))
    with LiveBytes() as count:
        assert torch.equal(linear_into(torch.empty_like(x), x, w), x @ w.t())
        add_product(total, x, w)
    assert count.calls["_linear_pointwise"] == 0
    assert error(total, x.double().t() @ w.double()) < 1e-2


def test_the_second_copy_is_a_part(onednn_is_faster):
    x, w, g = torch.randn(4096, 256), torch.randn(1024, 256), torch.randn(4096, 1024)
    out, total = torch.empty(4096, 1024), torch.zeros(1024, 256)
    with LiveBytes() as count:
        linear_into(out, x, w)
        add_product(total, g, x)
    assert count.calls["_linear_pointwise"] > 2
    assert count.peak <= 4 * products.PART


def test_few_shapes_are_compiled(onednn_is_faster, monkeypatch):
    """Over all lengths up to 4096 one layer's product meets no more kinds than multiples of 64 in a part."""
    seen = set()
    monkeypatch.setattr(products, "_onednn", lambda x, w, b=None: seen.add(x.shape) or x.new_zeros(len(x), len(w)))
    for n in range(1, 4097, 7):
        linear_into(torch.empty(n, 512), torch.empty(n, 256), torch.empty(512, 256))
    assert 1 < len(seen) <= products.PART // 512 // products.MULTIPLE


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_turned_off_with_pytorchs_switch(onednn_is_faster):
    x = torch.randn(512, 512)
    with LiveBytes() as count, torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear_into(torch.empty_like(x), x, x), x @ x.t())
    assert count.calls["_linear_pointwise"] == 0


def test_operations_are_counted(library):
    x, w = torch.randn(512, 256), torch.randn(128, 256)
    with FlopCounterMode(display=False) as count:
        linear_into(torch.empty(512, 128), x, w)
    assert count.get_total_flops() == 2 * 512 * 256 * 128
