"""What kind of tensor this is, where PyTorch has no public word for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .capabilities import capability


@capability
def functorch_is_active() -> Callable[[], bool]:
    """A function that tells whether one of torch.func's transforms is at work."""
    return torch._C._are_functorch_transforms_active


@capability
def storage_holders() -> Callable[[int], int]:
    """A function from a storage's address to the number of references to it."""
    return torch._C._storage_Use_Count


def memory_is_shared(tensor: Tensor) -> bool:
    """True where another tensor has the memory of this one too, and where PyTorch does not tell."""
    count = storage_holders()
    storage = tensor.untyped_storage()
    # The tensor and, in Python, the storage itself.
    return count is None or count(storage._cdata) > 2


@capability
def dispatch_modes() -> Callable[[], int]:
    """A function that tells how many dispatch modes are at work in this thread."""
    return torch._C._len_torch_dispatch_stack


def is_fake(tensor: Tensor) -> bool:
    """True for a tensor with a shape and a device but no contents, which dry runs and tracers send through the code."""
    return type(tensor).__name__ == "FakeTensor"


def are_plain(*tensors: Tensor) -> bool:
    """True where PyTorch's operators compute on these directly: no subclass of anybody's, no transform of torch.func.

    Where PyTorch does not tell about transforms, nothing is taken to be plain.
    """
    active = functorch_is_active()
    if active is None or active():
        return False
    return all(type(t) in (Tensor, nn.Parameter) or is_fake(t) for t in tensors)
