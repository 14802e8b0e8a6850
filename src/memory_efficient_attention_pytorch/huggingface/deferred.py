"""What stands for a tensor in a model until it is used as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..torch_internals.trees import tree_map_only


class Deferred:
    """Makes a tensor when first used: attributes, operators and PyTorch's functions asked of it apply to that.

    Shape and what follows from it are known without. Not a tensor itself: DDP looks for those to prepare for backward.
    """

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def materialize(self) -> Tensor:
        """Return the tensor, the same one at each call."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*touched(args), **touched(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask for names with an underscore before __init__ has run.
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.materialize(), name)


def touched(value: Any) -> Any:
    """Return nested containers with tensors in the place of what stands for them."""
    return tree_map_only(Deferred, lambda deferred: deferred.materialize(), value)


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.materialize(), name)(*touched(args), **touched(kwargs))

    return operate


def _comparison(name: str) -> Callable[..., Any]:
    """Compare element by element, as tensors do, but not with what no tensor is compared with, None for one."""
    operate = _operator(name)

    def compare(self: Deferred, other: Any) -> Any:
        return operate(self, other) if isinstance(other, Tensor | Deferred | int | float) else NotImplemented

    return compare


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "matmul", "rmatmul"),
    *("floordiv", "rfloordiv", "mod", "rmod", "neg", "pos", "abs", "invert", "and", "rand", "or", "ror", "xor", "rxor"),
    *("getitem", "setitem", "len", "iter", "contains", "reversed", "bool", "float", "int", "array"),
):
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Deferred, f"__{_name}__", _comparison(f"__{_name}__"))
Deferred.__hash__ = object.__hash__  # type: ignore[method-assign]  # __eq__ is element by element, as a tensor's
