"""Properties of tensors for which PyTorch has no public interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .capabilities import capability


@capability
def functorch_is_active() -> Callable[[], bool]:
    """A function that tells whether a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active


@capability
def storage_holders() -> Callable[[int], int]:
    """A function from a storage's address to the number of references to it."""
    return torch._C._storage_Use_Count


@capability
def without_contents() -> Callable[..., Tensor]:
    """A function ``(cls, shape, dtype=, device=)`` that returns an instance of a tensor subclass without contents.

    The class says in ``__torch_dispatch__`` what operators compute on instead.
    """
    return Tensor._make_wrapper_subclass


def memory_is_shared(tensor: Tensor) -> bool:
    """True if another tensor shares this one's memory, or if PyTorch cannot tell."""
    count = storage_holders()
    storage = tensor.untyped_storage()
    # The tensor and, in Python, the storage itself.
    return count is None or count(storage._cdata) > 2


@capability
def dispatch_modes() -> Callable[[], int]:
    """A function that returns the number of active dispatch modes in this thread."""
    return torch._C._len_torch_dispatch_stack


def is_fake(tensor: Tensor) -> bool:
    """True for a tensor with a shape and a device but no contents, as used by dry runs and tracers."""
    return type(tensor).__name__ == "FakeTensor"


def is_transformed() -> bool:
    """True inside a torch.func transform, as far as PyTorch can tell."""
    active = functorch_is_active()
    return active is not None and active()


def are_plain(*tensors: Tensor) -> bool:
    """True if PyTorch's operators compute on these directly: no tensor subclass, no torch.func transform.

    If PyTorch cannot tell about transforms, no tensor counts as plain.
    """
    if functorch_is_active() is None or is_transformed():
        return False
    return all(type(t) in (Tensor, nn.Parameter) or is_fake(t) for t in tensors)
