"""Fake tensors of a device that this machine, or this build of PyTorch, does not have."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
_CPU_GENERATOR = torch.Generator()
_ENGINE_RUN_BACKWARD = torch.autograd._engine_run_backward
_SCALED_DOT_PRODUCT_ATTENTION = F.scaled_dot_product_attention


@contextmanager
def stand_in(device: torch.device) -> Iterator[None]:
    """Let fake tensors of ``device`` be differentiated, moved and attended to although it is absent.

    Autograd asks each tensor where it lives and aborts the process over a device it has no driver for. Its question
    passes through dispatch modes, whereas Python code reads the answer from the fake tensor: so PyTorch's internals are
    told "on the CPU" while the model sees the device it was asked to be on. Only autocast must hear the truth, since it
    leaves tensors of other devices alone; for its sake the device gets the CPU's guard, which does nothing.
    """
    if device.type == "cpu" or _present(device):
        yield
        return
    calls = _DecideByRealDevice(device)
    with ExitStack() as entered:
        entered.enter_context(_guard(device))
        for owner, name, value in (
            *_replacements(device),
            (torch.autograd, "_engine_run_backward", calls.run_backward),
        ):
            entered.enter_context(replaced(owner, name, value))
        entered.enter_context(_ReportCpu(device))
        entered.enter_context(calls)
        yield


def _replacements(device: torch.device) -> list[tuple[Any, str, Any]]:
    """What would ask for the device's driver or random state: owner, name and what to answer."""
    everywhere = [(F, "scaled_dot_product_attention", _attend), (torch, "Generator", lambda *_, **__: _CPU_GENERATOR)]
    if device.type != "cuda":
        return everywhere
    return everywhere + [
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "device", lambda _: nullcontext()),
        (torch.cuda, "get_rng_state", lambda *_: _CPU_GENERATOR.get_state()),
        (torch.cuda, "set_rng_state", lambda *_: None),
    ]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` within."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _ReportCpu(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and not torch.is_autocast_enabled(self.device.type):
            return CPU
        return func(*args, **(kwargs or {}))


class _DecideByRealDevice(TorchFunctionMode):
    """Answers the calls whose outcome PyTorch decides by the device it was misled about."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SCALED_DOT_PRODUCT_ATTENTION:
            return _attend(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda) and isinstance(args[0], FakeTensor):
            return self._move(func, *args, **kwargs)
        return func(*args, **kwargs)

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """The autograd engine, which would look for the device's streams if it heard the truth, as under autocast."""
        with self, torch.autocast(self.device.type, enabled=False):
            return _ENGINE_RUN_BACKWARD(*args, **kwargs)

    def _move(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if func is not Tensor.to:
            device, dtype = (CPU if func is Tensor.cpu else self.device), tensor.dtype
            copy = False
        else:
            copy = kwargs.pop("copy", False)
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
            device, dtype = device or tensor.device, dtype or tensor.dtype
        if device.type == tensor.device.type and dtype == tensor.dtype and not copy:
            return tensor
        return aten._to_copy(tensor, device=device, dtype=dtype)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` by the kernel that a CUDA device would take."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    kernel = _kernel(query, key, value, attn_mask)
    if kernel == "flash":
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if kernel == "efficient":
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, query).expand(*query.shape[:3], key.shape[2])
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]
    return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """The fused kernel that current CUDA devices have for these arguments, by PyTorch's conditions."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    widths = query.shape[-1], value.shape[-1]
    if query.dim() != 4 or not (half or query.dtype == torch.float32):
        return None
    if half and mask is None and widths[0] == widths[1] <= 256:
        return "flash"
    aligned = all(width % (8 if half else 4) == 0 for width in widths)
    return "efficient" if aligned and query.shape[1] == key.shape[1] else None


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> Tensor:
    if enable_gqa:
        group = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(group, -3) for tensor in (key, value))
    scores = query @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores + _additive(attn_mask, query)
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _present(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device.type


@contextmanager
def _guard(device: torch.device) -> Iterator[None]:
    """Lend the CPU's device guard to a device that this build of PyTorch was compiled without."""
    if device.type != "cuda" or torch.backends.cuda.is_built():
        yield  # a build with CUDA brings a guard for machines without one
        return
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    try:
        table = (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(libraries[0])), _GUARD_TABLE)
    except (OSError, ValueError, IndexError) as error:
        raise NotImplementedError(
            "this build of PyTorch has no CUDA and cannot pretend to: plan for device 'cuda' with a build that has it"
        ) from error
    cpu, cuda = 0, 1  # c10::DeviceType
    before = table[cuda]
    table[cuda] = table[cpu]
    try:
        yield
    finally:
        table[cuda] = before


_GUARD_TABLE = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
