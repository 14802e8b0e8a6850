"""What travels through a transformers model in place of its mask: arguments of attention, not n × m elements."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.mask_function import MaskFunction, MaskMod
from ..attention.visibility import Tile, Visibility
from ..common.divided import Divided
from ..torch_internals.engine import version
from ..torch_internals.trees import tree_map_only
from .deferred import Deferred


class Visible(Deferred):
    """Arguments of :func:`dot_product_attention` that stand for a bool mask ``(batch, 1, queries, keys)``, True = seen.

    A model may pass it on, keep its last queries, or move it to a device. Used otherwise it becomes that mask, with a
    warning; in a sum with floating-point scores 0 where seen and their dtype's lowest value elsewhere. Layers share the
    object, and so what has been learnt of its tiles.

    left_to_layers: the model's own attention gets no mask here, and a layer says itself whether it is causal.
    """

    dtype = torch.bool

    def __init__(
        self,
        batch: int,
        queries: int,
        keys: int,
        arguments: dict[str, Any],
        device: torch.device,
        divided: Divided | None = None,
        left_to_layers: bool = False,
    ) -> None:
        self.batch, self.queries, self.keys, self.device, self.divided = batch, queries, keys, device, divided
        self._arguments, self._left_to_layers = arguments, left_to_layers
        self._made: tuple[Tensor, int] | None = None
        self._elsewhere: dict[torch.device, Visible] = {}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, 1, self.queries, self.keys))

    @property
    def arguments(self) -> dict[str, Any]:
        """Those given, or the mask, if it was made and may have been changed since."""
        if self._made is None:
            return self._arguments
        mask, number = self._made
        same = version(mask) == number and not mask.is_inference()  # of whose changes nothing is known
        return self._arguments if same else {"mask": mask}

    @property
    def left_to_layers(self) -> bool:
        return self._left_to_layers and self._made is None

    def materialize(self) -> Tensor:
        """Return the mask, made once. Raises NotImplementedError where its tokens are divided over processes."""
        if self._made is None:
            if self.divided is not None:
                raise NotImplementedError("attention_mask: a model that reads it cannot have its tokens divided")
            if self.queries > 1:
                what = "the model itself reads its mask, which is made as a tensor of batch × queries × keys for it"
                _warn_the_caller(f"attention_mask: {what}")
            visibility = Visibility.build((self.batch, 1, self.queries, self.keys), self.device, **self._arguments)
            seen = visibility.tile_mask(Tile(0, self.queries, 0, self.keys, full=visibility.trivial), self.device)
            seen = torch.ones((), dtype=torch.bool, device=self.device) if seen is None else seen
            made = seen.expand(self.shape).contiguous()
            self._made = made, version(made)
        return self._made[0]

    def contiguous(self, **_: Any) -> Visible:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, as accelerate does before each module of a model that is on several."""
        device = kwargs.get("device", args[0] if args else None)
        converts = any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values()))
        if converts or not isinstance(device, str | int | torch.device):
            return self.materialize().to(*args, **kwargs)
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._elsewhere:
            arguments: dict[str, Any] = tree_map_only(Tensor, lambda x: x.to(*args, **kwargs), self.arguments)
            if callable(arguments.get("mask")):
                arguments["mask"] = evaluated_on(self.device, arguments["mask"])
            moved = Visible(self.batch, self.queries, self.keys, arguments, device, self.divided, self.left_to_layers)
            self._elsewhere[device] = moved
        return self._elsewhere[device]

    def __getitem__(self, index: Any) -> Any:
        kept = self._last(index)
        if kept is None:
            return self.materialize()[index]
        if kept == self.queries:
            return self
        arguments = dict(self.arguments)
        if isinstance(mask := arguments.get("mask"), Tensor) and mask.dim() == 4:
            arguments["mask"] = mask[:, :, -kept:]
        elif callable(mask):
            arguments["mask"] = _of_queries_from(self.queries - kept, mask)
        return Visible(self.batch, kept, self.keys, arguments, self.device, self.divided)

    def _last(self, index: Any) -> int | None:
        """Return how many queries are kept if the index keeps the last ones and all else; None for another index."""
        if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(part, slice) for part in index):
            return None
        of_batch, of_heads, rows, of_keys = (range(size)[part] for size, part in zip(self.shape, index, strict=True))
        whole = (of_batch, of_heads, of_keys) == (range(self.batch), range(1), range(self.keys))
        trailing = len(rows) > 0 and rows == range(self.queries - len(rows), self.queries)
        return len(rows) if whole and trailing else None

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        if function.__name__.strip("_") in ("add", "radd", "iadd"):
            dtypes = [x.dtype for x in (*args, *given[1].values()) if isinstance(x, Tensor) and x.is_floating_point()]
            if dtypes:
                given = tree_map_only(Visible, lambda mask: mask._lowering(dtypes[0]), given)
        return super().__torch_function__(function, types, *given)

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    __radd__ = __add__

    def _lowering(self, dtype: torch.dtype) -> Tensor:
        seen = self.materialize()
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def evaluated_on(device: torch.device, function: MaskMod) -> MaskFunction:
    """Return a function that computes on the device of what it captures, whatever that of its indices."""

    def visible(*indices: Tensor) -> Tensor:
        return function(*(index.to(device) for index in indices)).to(indices[0].device)

    return MaskFunction(visible)


def _of_queries_from(first: int, function: MaskMod) -> MaskFunction:
    return MaskFunction(lambda batch, head, query, key: function(batch, head, query + first, key))


def _warn_the_caller(message: str) -> None:
    """Warn at the nearest line that is neither of this folder nor of PyTorch: the model's."""
    own = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(own):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
