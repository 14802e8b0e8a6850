"""Keep results of a forward pass on purpose, so that recomputation in backward can skip them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..common.dry_run import device_type, keeps

D = TypeVar("D")
_active: ContextVar[KeptResults | None] = ContextVar("kept_results", default=None)


class KeptResults:
    """Keeps results of some calls within one forward pass, in call order.

    The code that recomputes a pass runs it inside :meth:`keeping`, saves what :meth:`release` returns, and reruns it
    inside :meth:`repeating`; the code that computes a result to be kept calls :meth:`fetch`. Objects nest: an inner one
    fetches its results through the outer one, which keeps or hands them out, too. Copies to and from host memory are
    asynchronous, so only the device's stream may read them.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._tensors: list[Tensor] = []
        self._repeated: Iterator[_Call] | None = None
        self._outer: KeptResults | None = None

    @staticmethod
    def active() -> KeptResults | None:
        """The innermost active object, or None."""
        return _active.get()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep every result fetched inside the context."""
        self._outer = _active.get()
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)
            self._outer = None

    def release(self) -> tuple[Tensor, ...]:
        """Return the kept tensors, call after call, and release them."""
        tensors, self._tensors = tuple(self._tensors), []
        return tensors

    @contextmanager
    def repeating(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Hand out these tensors, those of :meth:`release`, call by call, inside the context."""
        self._tensors, self._repeated = list(tensors), iter(self._calls)
        try:
            with self.keeping():
                yield
        finally:
            self._tensors, self._repeated = [], None

    def fetch(
        self,
        owner: object,
        compute: Callable[[], tuple[D, tuple[Tensor, ...]]],
        *,
        offload: bool = False,
        option: str = "results",
    ) -> tuple[D, tuple[Tensor, ...]]:
        """Return ``compute()``, run in the forward pass only: a description without tensors, and tensors.

        owner: the caller, the same object in both passes. offload: keep the tensors in host memory. option: the user's
        option, named in errors.

        Raises:
            ValueError: the repetition calls in another order than the forward pass.
        """
        if self._repeated is None:
            outer = self._outer
            description, tensors = (
                compute() if outer is None else outer.fetch(owner, compute, offload=offload, option=option)
            )
            kept = [_to_host(t) if offload else t for t in tensors]
            for tensor in kept:
                keeps(tensor)
            self._calls.append(_Call(owner, description, len(self._tensors), [t.device for t in tensors]))
            self._tensors += kept
            return description, tensors
        call = next(self._repeated, None)
        if call is None or call.owner is not owner:
            called = f"{type(owner).__name__} to be called in backward as in forward"
            raise ValueError(f"{option}: expected {called} (no checkpoint inside a reversible block), got another call")
        mine = zip(self._tensors[call.start :], call.devices, strict=False)
        return call.description, tuple(t.to(device, non_blocking=True) for t, device in mine)


class _Call(NamedTuple):
    """A call of :meth:`KeptResults.fetch`: the index of its first tensor, and the tensors' devices."""

    owner: object
    description: Any
    start: int
    devices: list[torch.device]


def _to_host(tensor: Tensor) -> Tensor:
    if device_type(tensor.device) == "cpu":
        return tensor
    pinned = tensor.is_cuda and torch.cuda.is_available()
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=pinned)
