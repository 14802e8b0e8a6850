"""What travels through a transformers model in place of its mask: arguments of attention, not n × m elements."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..attention.mask_function import MaskFunction, MaskMod
from ..attention.visibility import Tile, Visibility
from ..common.divided import Divided
from ..torch_internals.trees import tree_map_only


@dataclass(frozen=True, eq=False)
class Visible:
    """Arguments of :func:`dot_product_attention` that stand for a bool mask ``(batch, 1, queries, keys)``.

    A model may pass it on, keep its last queries, move it to a device, or add a bias to it. Whatever else it asks for
    is answered by the mask as a tensor, made once, with a warning. Layers share the object, and so what has been learnt
    of its tiles.
    """

    batch: int
    queries: int
    keys: int
    arguments: dict[str, Any]
    device: torch.device
    divided: Divided | None = None
    ndim = 4  # transformers passes 4-d masks on unchanged

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 1, self.queries, self.keys

    @property
    def dtype(self) -> torch.dtype:
        bias = self.arguments.get("attn_bias")
        return torch.bool if bias is None else bias.dtype

    @cached_property
    def tensor(self) -> Tensor:
        """The mask as the model's own attention would have it: bool, True = seen, or a bias that hides the others."""
        if self.divided is not None:
            raise NotImplementedError("attention_mask: a model that reads it cannot have its tokens divided")
        if self.queries > 1:
            what = "the model itself reads its mask, which is made as a tensor of batch × queries × keys for it"
            warnings.warn(f"attention_mask: {what}", stacklevel=3)
        given = {name: value for name, value in self.arguments.items() if name != "attn_bias"}
        visibility = Visibility.build(self.shape, self.device, **given)
        everything = Tile(0, self.queries, 0, self.keys, full=visibility.trivial)
        seen = visibility.tile_mask(everything, self.device)
        seen = torch.ones((), dtype=torch.bool, device=self.device) if seen is None else seen
        bias = self.arguments.get("attn_bias")
        if bias is None:
            return seen.expand(self.shape).contiguous()
        hidden: Tensor = bias.masked_fill(~seen, torch.finfo(bias.dtype).min)
        return hidden

    def contiguous(self) -> Visible:
        return self

    def dim(self) -> int:
        return self.ndim

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, as accelerate does before each module of a model that is on several."""
        device = kwargs.get("device", args[0] if args else None)
        converts = any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values()))
        if converts or not isinstance(device, str | int | torch.device):
            return self.tensor.to(*args, **kwargs)
        moved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.to(*args, **kwargs), self.arguments)
        if callable(moved.get("mask")):
            moved["mask"] = _evaluated_on(self.device, moved["mask"])
        return replace(self, arguments=moved, device=torch.device(device))

    def __getitem__(self, index: Any) -> Any:
        kept = self._last(index)
        if kept is None:
            return self.tensor[index]
        if kept == self.queries:
            return self
        first, arguments = self.queries - kept, dict(self.arguments)
        if callable(arguments.get("mask")):
            arguments["mask"] = _of_queries_from(first, arguments["mask"])
        if "attn_bias" in arguments and arguments["attn_bias"].shape[-2] > 1:
            arguments["attn_bias"] = arguments["attn_bias"][..., first:, :]
        return replace(self, queries=kept, arguments=arguments)

    def _last(self, index: Any) -> int | None:
        """Return how many queries are kept if the index keeps the last ones and all else; None for another index."""
        if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(part, slice) for part in index):
            return None
        of_batch, of_heads, rows, of_keys = (range(size)[part] for size, part in zip(self.shape, index, strict=True))
        whole = (of_batch, of_heads, of_keys) == (range(self.batch), range(1), range(self.keys))
        trailing = len(rows) > 0 and rows == range(self.queries - len(rows), self.queries)
        return len(rows) if whole and trailing else None

    def __add__(self, other: Any) -> Any:
        """Add a bias, for which attention has an argument, too."""
        before = self.arguments.get("attn_bias")
        if not isinstance(other, Tensor) or not other.is_floating_point() or other.dim() < 2:
            return self.tensor + other
        return replace(self, arguments={**self.arguments, "attn_bias": other if before is None else before + other})

    __radd__ = __add__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if function.__name__ in ("add", "__add__", "__radd__") and len(args) == 2 and not kwargs:
            one, other = args
            return one + other if isinstance(one, Visible) else other + one
        args, kwargs = tree_map_only(Visible, lambda mask: mask.tensor, (tuple(args), kwargs or {}))
        return function(*args, **kwargs)


def _evaluated_on(device: torch.device, function: MaskMod) -> MaskFunction:
    """Return a function that computes on the device of what it captures, whatever that of its indices."""

    def visible(*indices: Tensor) -> Tensor:
        return function(*(index.to(device) for index in indices)).to(indices[0].device)

    return MaskFunction(visible)


def _of_queries_from(first: int, function: MaskMod) -> MaskFunction:
    return MaskFunction(lambda batch, head, query, key: function(batch, head, query + first, key))


def _by_tensor(operation: str) -> Callable[..., Any]:
    def apply(self: Visible, *others: Any) -> Any:
        return getattr(self.tensor, operation)(*others)

    return apply


for _operation in ("and", "rand", "or", "ror", "xor", "invert", "mul", "rmul", "sub", "rsub", "eq", "ne", "gt", "lt"):
    setattr(Visible, f"__{_operation}__", _by_tensor(f"__{_operation}__"))
