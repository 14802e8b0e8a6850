"""What attention found in a forward pass, for the same pass repeated in backward: it need not be found again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dry_run import keeps
from .errors import require


class Found(NamedTuple):
    """An attention's output ``(b, h, n, e)``, log-sum-exp and what else its backward asks for; ``by`` which of ours."""

    by: Any
    tensors: tuple[Tensor, ...]


_active: ContextVar[Recording | None] = ContextVar("recording", default=None)


class Recording:
    """The attentions of one forward pass in the order of their calls.

    Whoever repeats the pass runs it inside :meth:`record`, keeps what :meth:`release` returns, and repeats it inside
    :meth:`replay`. Recordings nest: what an inner one is asked for, and has not, comes from the outer one if that
    replays. A copy in host memory is made and fetched without waiting: it is for the device's stream alone to read.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[object, Any, list[torch.device]]] = []
        self._tensors: list[Tensor] = []
        self._taken: int | None = None
        self._outer: Recording | None = None

    @staticmethod
    def active() -> Recording | None:
        """The innermost recording that runs or replays."""
        return _active.get()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside, note all that :meth:`find` comes upon."""
        with self._inside():
            yield

    def release(self) -> tuple[Tensor, ...]:
        """The tensors noted, call after call, of which the recording then lets go."""
        tensors, self._tensors = tuple(self._tensors), []
        return tensors

    @contextmanager
    def replay(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, :meth:`find` returns these tensors, those of :meth:`release`, call by call."""
        self._tensors, self._taken = list(tensors), 0
        try:
            with self._inside():
                yield
        finally:
            self._tensors, self._taken = [], None

    def find(self, owner: object, compute: Callable[[], Found], offload: bool) -> Found:
        """What ``compute`` returns, or returned in the forward pass for ``owner``; ``offload``: keep it on the host."""
        if self._taken is None:
            outer = self._outer
            found = compute() if outer is None else outer.find(owner, compute, offload)
            self._calls.append((owner, found.by, [t.device for t in found.tensors]))
            for tensor in found.tensors:
                self._tensors.append(_to_host(tensor) if offload else tensor)
                keeps(self._tensors[-1])
            return found
        number, self._taken = self._taken, self._taken + 1
        known = number < len(self._calls) and self._calls[number][0] is owner
        expected = "attention to be called in backward as in forward (no checkpoint inside a reversible block)"
        require(known, "keep_attention", expected, f"another call, the {number + 1}. of the repetition")
        before = sum(len(devices) for *_, devices in self._calls[:number])
        _, by, devices = self._calls[number]
        kept = self._tensors[before : before + len(devices)]
        return Found(by, tuple(t.to(device, non_blocking=True) for t, device in zip(kept, devices, strict=True)))

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._outer = _active.get()
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self._outer = None


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    pinned = tensor.is_cuda and torch.cuda.is_available()
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=pinned)
