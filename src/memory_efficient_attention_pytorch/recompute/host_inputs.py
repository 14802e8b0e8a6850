"""Keep the inputs of checkpoints in host memory, copied while the device computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..common.dry_run import current, device_type
from ..torch_internals.engine import version
from ..torch_internals.tensors import are_plain


class Lane:
    """Copies between a device and the host, in order, on a stream of its own where the device has streams."""

    def __init__(self, device: torch.device) -> None:
        accelerator = None if current() else torch.accelerator.current_accelerator()
        self.device, self.pinned = device, accelerator is not None and accelerator.type == device.type != "mps"
        self.stream = torch.Stream(device) if self.pinned else None

    @staticmethod
    def serves(tensor: Tensor) -> bool:
        """Return True if the tensor is not on the host."""
        return device_type(tensor.device) != "cpu"

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy after all work queued on the device so far; return an event to wait for."""
        if self.stream is None:
            return target.copy_(source)
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Make all work queued on the device from now on wait for a copy."""
        if self.stream is not None:
            torch.accelerator.current_stream(self.device).wait_event(copied)

    def abandon(self, tensor: Tensor) -> None:
        """Let go of a tensor on the device for whose copy nobody will wait."""
        if self.stream is not None:
            tensor.record_stream(self.stream)


class InputsOnHost:
    """A checkpoint function, called as ``torch.utils.checkpoint.checkpoint``, that keeps inputs in host memory.

    Each tensor among the positional arguments is copied to pinned memory while the device computes, and is released on
    the device at the next call. In backward, a call's inputs are copied back while the following call is recomputed, so
    the device holds two inputs at a time. Tensors in host memory and tensor subclasses are not copied.

    Raises:
        RuntimeError: an input is changed in place while it is being copied, or before the next call.
    """

    def __init__(self, checkpoint: Callable[..., Any], lane: type[Lane] = Lane) -> None:
        self.checkpoint, self.lane = checkpoint, lane
        self.lanes: dict[torch.device, Lane] = {}
        self.last: Callable[[], _Call | None] = lambda: None  # the call whose inputs may be on the device
        self.ahead: Callable[[], _Call | None] = lambda: None  # the call whose inputs are being copied back

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, Tensor) and self.moves(x) for x in args):
            return self.checkpoint(function, *args, **kwargs)
        call = _Call(self)
        with saved_tensors_hooks(call.pack, call.unpack):
            return self.checkpoint(function, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> InputsOnHost:
        return InputsOnHost(self.checkpoint, self.lane)  # waiting inputs belong to graphs, which are not copied

    def moves(self, tensor: Tensor) -> bool:
        # PyTorch 2.11's checkpoint saves an empty tensor besides its inputs.
        return (
            not torch.compiler.is_compiling() and are_plain(tensor) and tensor.numel() > 0 and self.lane.serves(tensor)
        )

    def lane_of(self, device: torch.device) -> Lane:
        if device not in self.lanes:
            self.lanes[device] = self.lane(device)
        return self.lanes[device]


class _Call:
    """The inputs of one call, held by the graph, and the call before it."""

    def __init__(self, owner: InputsOnHost) -> None:
        self.owner, self.before = owner, owner.last
        self.inputs: list[weakref.ref[_Input]] = []
        before = self.before()
        if before is not None:
            before.leave()
        owner.last = weakref.ref(self)

    def pack(self, tensor: Tensor) -> Tensor | _Input:
        if not self.owner.moves(tensor):
            return tensor
        packed = _Input(tensor.detach(), self.owner.lane_of(tensor.device))
        self.inputs.append(weakref.ref(packed))
        return packed

    def unpack(self, packed: Tensor | _Input) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        ahead, before = self.owner.ahead(), self.before()
        if ahead is not None and ahead not in (self, before):
            ahead.leave()  # a backward pass that ended early
        tensor = packed.arrive()
        packed.leave()
        if before is not None:
            before.arrive()
            self.owner.ahead = weakref.ref(before)
        return tensor

    def arrive(self) -> None:
        for packed in filter(None, (reference() for reference in self.inputs)):
            packed.arrive()

    def leave(self) -> None:
        for packed in filter(None, (reference() for reference in self.inputs)):
            packed.leave()


class _Input:
    """A tensor in transit to the host, on the host, or in transit back."""

    def __init__(self, tensor: Tensor, lane: Lane) -> None:
        self.on_device: Tensor | None = None
        self.lane, self.version, self.device = lane, version(tensor), tensor.device
        self.on_host = torch.empty_like(tensor, device="cpu", pin_memory=lane.pinned)
        self.copied, self.on_device = lane.copy(self.on_host, tensor), tensor

    def arrive(self) -> Tensor:
        """Return the tensor on the device, whose contents may be in transit until :meth:`leave`."""
        if self.on_device is None:
            self.on_device = torch.empty_like(self.on_host, device=self.device)
            self.copied = self.lane.copy(self.on_device, self.on_host)
            self.version = version(self.on_device)
        return self.on_device

    def leave(self) -> None:
        """Release the tensor on the device once pending copies have finished."""
        if self.on_device is not None:
            self.lane.wait(self.copied)
            if version(self.on_device) != self.version:
                raise RuntimeError("an input of a checkpoint has been modified by an inplace operation")
            self.on_device = None

    def __del__(self) -> None:
        # A graph that is dropped; elsewhere the computing stream has waited, so that the memory is free at once.
        if self.on_device is not None:
            self.lane.abandon(self.on_device)
