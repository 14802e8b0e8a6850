"""Two computations of the same thing compared: outputs, gradients by their largest relative difference, work done."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from memory_efficient_attention_pytorch.torch_internals import attention_kernels
from tests.memory.live_bytes import PRODUCTS, LiveBytes


def gradients(out: Tensor, wanted: Iterable[Tensor], seed: int = 1, **kwargs) -> tuple[Tensor | None, ...]:
    """Gradients of ``(out * c).sum()`` for a fixed random c, so that no two outputs weigh alike."""
    return torch.autograd.grad(out, tuple(wanted), cotangent_of(out, seed), **kwargs)


def backward(out: Tensor, **kwargs) -> None:
    """As :func:`gradients`, into ``.grad``."""
    out.backward(cotangent_of(out), **kwargs)


def cotangent_of(out: Tensor, seed: int = 1) -> Tensor:
    """The c of :func:`gradients`, the same in every dtype but for rounding."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)


BEFORE = 0.5
"""What :func:`filled` gradients are made of."""


def filled(leaves: Iterable[Tensor], value: float = BEFORE) -> list[Tensor]:
    """The leaves' new gradients, all of this value."""
    leaves = list(leaves)
    for leaf in leaves:
        leaf.grad = torch.full_like(leaf, value)
    return [leaf.grad for leaf in leaves]


def plus(found: Iterable[Tensor]) -> list[Tensor]:
    """The sums of what is found and what gradients were ``filled`` with."""
    return [BEFORE + g for g in found]


def difference(ours: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest true value."""
    assert ours.shape == truth.shape, f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return 0.0
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)).item()


def furthest(differences: Iterable[float]) -> float:
    """The largest, or NaN where one is: Python's ``max`` passes over a NaN that does not come first."""
    return torch.tensor([*differences], dtype=torch.float64).max().item()


def apart(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Largest difference between tensors of the same name, of which both have the same."""
    assert ours.keys() == truth.keys()
    return furthest((ours[name] - truth[name]).abs().max().item() for name in truth)


def assert_same(ours: Sequence[Tensor | None], truth: Sequence[Tensor | None], tolerance: float) -> None:
    """Every pair equal to ``tolerance``, and None only where both are."""
    assert len(ours) == len(truth)
    for i, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        assert (mine is None) == (true is None), f"tensor {i}: {mine}, expected {true}"
        if mine is not None and true is not None:
            assert mine.dtype == true.dtype, f"tensor {i}: {mine.dtype}, expected {true.dtype}"
            error = difference(mine, true)
            assert error <= tolerance, f"tensor {i} {tuple(true.shape)}: off by {error:.2e}, allowed {tolerance:.1e}"


def with_seed(function: Callable[[], Tensor], seed: int = 7) -> Tensor:
    """``function()`` from a fixed random state."""
    torch.manual_seed(seed)
    return function()


def products(count: LiveBytes) -> int:
    """Matrix products called, those that add to a sum in place included."""
    return sum(count.calls[name] for name in {*PRODUCTS, "addmm_", "baddbmm_"})


def skip_unless_usable(way: str) -> None:
    """Skip a test of a way of computing attention that this PyTorch does not have."""
    if way == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    if way == "cpu_kernel" and attention_kernels.cpu_kernel() is None:
        pytest.skip("PyTorch without the kernel's operators")
