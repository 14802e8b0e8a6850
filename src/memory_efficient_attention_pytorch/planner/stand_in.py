"""Dry-run for a device that may be absent: the CPU under another name stands in for it.

PyTorch distinguishes ``cpu:0`` from ``cpu`` as it does a GPU from the host: it copies between the two and refuses to
mix them, while autograd, autocast and random numbers need no driver. Where PyTorch behaves differently on a GPU, this
module does so too, for this thread and while the mode is active.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..attention.sdpa import cuda_kernels
from ..common.dry_run import STAND_IN
from ..torch_internals import attention_kernels
from ..torch_internals.autocast import cast_on_cuda
from ..torch_internals.fake import calls_inside

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class StandIn(TorchFunctionMode):
    """Places on ``STAND_IN`` what code places on ``device_type``, and chooses kernels as PyTorch does on that device.

    Raises NotImplementedError for what cannot be told without the device: recurrent networks on CUDA.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self._running: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Arguments = (), kwargs: Keywords | None = None) -> Any:
        if torch.is_autocast_enabled(self.device_type) or torch.get_autocast_dtype(self.device_type) != _UNTOUCHED:
            raise NotImplementedError(
                f"the module's own torch.autocast({self.device_type!r}) cannot be planned: remove it and pass the "
                "dtype as plan(autocast=…)"
            )
        args, kwargs = self._placed(func, args, dict(kwargs or {}))
        name = getattr(func, "__name__", "")
        if func is getattr(Tensor, self.device_type, None):
            func, args, kwargs = Tensor.to, (args[0], STAND_IN), {}
        if name == "pin_memory":
            return args[0]  # host memory is not counted, pinned or not
        if func in (torch.tensor, torch.as_tensor, Tensor.to):
            return self._there(func(*args, **kwargs), [*args[1:], kwargs.get("device")])
        if self.device_type == "cuda":
            if name in _RECURRENT:
                raise NotImplementedError(f"{name} cannot be planned: what cuDNN keeps of it for backward is not known")
            if func is F.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
            if func is torch.dropout:  # F.dropout calls it
                return _dropout(*args, **kwargs)
            cast = cast_on_cuda(name)
            if cast is not None and torch.is_autocast_enabled("cpu"):
                with torch.autocast("cpu", enabled=False):
                    return cast(func, args, kwargs)
        # Some functions dispatch themselves a second time, under another name with the same arguments.
        call = (func, *map(id, args))
        inside = None if call in self._running else calls_inside(func)
        if inside is None:
            return func(*args, **kwargs)
        self._running.append(call)
        try:
            with self:
                return inside(*args, **kwargs)
        finally:
            self._running.pop()

    def _placed(self, func: Any, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
        """Return the arguments with the device replaced by ``STAND_IN``."""
        if "device" in kwargs:
            kwargs["device"] = self._device(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        movable = (str, int) if func is Tensor.to else ()
        return tuple(self._device(x) if isinstance(x, (torch.device, *movable)) else x for x in args), kwargs

    @staticmethod
    def _there(made: Tensor, wanted: list[Any]) -> Tensor:
        """Return ``made`` on ``STAND_IN`` if asked for there: fake tensors put known numbers on the host."""
        if made.device == STAND_IN or not any(isinstance(x, torch.device) and x == STAND_IN for x in wanted):
            return made
        return torch.empty(made.shape, dtype=made.dtype, device=STAND_IN, requires_grad=made.requires_grad)

    def _device(self, given: Any) -> Any:
        if given is None or isinstance(given, bool):
            return given
        device = torch.device(self.device_type, given) if isinstance(given, int) else torch.device(given)
        return STAND_IN if device.type == self.device_type else device


@contextmanager
def standing_in(device_type: str) -> Iterator[None]:
    """Activate :class:`StandIn`, which notices if autocast for the device itself is turned on."""
    before = torch.get_autocast_dtype(device_type)
    torch.set_autocast_dtype(device_type, _UNTOUCHED)
    try:
        with StandIn(device_type):
            yield
    finally:
        torch.set_autocast_dtype(device_type, before)


# Autocast for an absent device turns itself off, but leaves the dtype it was asked for.
_UNTOUCHED = torch.float64
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Compute ``scaled_dot_product_attention`` by the kernel that PyTorch would choose on CUDA."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    kernels = set()
    if query.dim() == 4:
        widths = query.shape[-1], value.shape[-1]
        kernels = cuda_kernels(query.dtype, widths, attn_mask is not None, query.shape[1] != key.shape[1])
    flash, efficient = attention_kernels.flash_kernel(), attention_kernels.efficient_kernel()
    with torch.autocast("cpu", enabled=False):
        if "flash" in kernels and flash is not None:
            return flash.forward(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if "efficient" in kernels and efficient is not None:
            if attn_mask is not None:
                attn_mask = _additive(attn_mask, query).expand(*query.shape[:3], key.shape[2])
            keeps = torch.is_grad_enabled()
            return efficient.forward(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]
        if enable_gqa:
            group = query.shape[-3] // key.shape[-3]
            key, value = (tensor.repeat_interleave(group, -3) for tensor in (key, value))
        scores = query @ key.mT
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            scores = scores + _additive(attn_mask, query)
        return _dropout(scores.softmax(-1), dropout_p, True) @ value


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """Drop as CUDA's kernel does, which keeps a bool mask; the CPU's operators keep one in the tensor's dtype."""
    return torch.native_dropout(input, p, True)[0] if train and 0 < p < 1 else torch.dropout(input, p, train)
