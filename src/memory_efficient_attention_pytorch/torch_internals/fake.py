"""Fake tensors, and the graph nodes that operations on them belong to: what a dry run needs of PyTorch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .capabilities import capability
from .tensors import storage_holders

T = TypeVar("T")


class FakeTensors(NamedTuple):
    """``mode()``: a context in which tensors come without contents; ``refusals``: its errors where these are wanted."""

    mode: Callable[[], AbstractContextManager[Any]]
    refusals: tuple[type[Exception], ...]


@capability
def fake_tensors() -> FakeTensors | None:
    from torch._subclasses import fake_tensor

    def mode() -> AbstractContextManager[Any]:
        return fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)

    return FakeTensors(mode, (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException))


def knows_contents(value: Any) -> bool:
    """Whether it is a fake tensor that carries the number it stands for, which operations in place change."""
    return getattr(value, "constant", None) is not None


def log_no_refusals() -> None:
    """Stop PyTorch from logging tracebacks of operators that need contents. For a program's own log."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


class Graph(NamedTuple):
    """``now()``: the number that the next node of this thread's autograd graph will have; ``differentiated()``: that
    of the node at work in backward, None outside of one."""

    now: Callable[[], int]
    differentiated: Callable[[], int | None]


@capability
def graph() -> Graph | None:
    """Access to the autograd graph's numbering, which tells in backward whose work is being differentiated."""
    now: Callable[[], int] = getattr(torch.autograd, "_get_sequence_nr")  # noqa: B009  the type checker does not know it
    node_at_work = torch._C._current_autograd_node

    def differentiated() -> int | None:
        node = node_at_work()
        return None if node is None else node._sequence_nr()

    differentiated()
    now()
    return Graph(now, differentiated)


@capability
def holders() -> Callable[[Tensor], tuple[int, int, int]] | None:
    """The numbers of references to a tensor's Python object, the tensor and its storage.

    The autograd engine adds two gradients in place depending on these. Without them a sum is taken to be a new tensor.
    """
    of_storage = storage_holders()
    if of_storage is None:
        return None

    def count(tensor: Tensor) -> tuple[int, int, int]:
        storage = tensor.untyped_storage()
        return sys.getrefcount(tensor), tensor._use_count(), of_storage(storage._cdata)  # type: ignore[attr-defined]

    count(torch.empty((), device="cpu"))
    return count


def around_calls(module: nn.Module, work: Callable[[], AbstractContextManager[None]]) -> None:
    """Make every call of ``module``, a private copy, run inside ``work()``.

    This does not use hooks, which would be mistaken for the owner's.
    """
    if not hasattr(module, "_compiled_call_impl") or not hasattr(module, "_call_impl"):
        raise NotImplementedError("this PyTorch calls modules in a way that a dry run does not know")

    def call(*args: Any, **kwargs: Any) -> Any:
        with work():
            return module._call_impl(*args, **kwargs)

    module.__dict__["_compiled_call_impl"] = call


_IN_PYTHON = ("torch.nn.functional", "torch.functional", "torch.autograd", "torch._tensor")


@cache
def calls_inside(function: Callable[..., T]) -> Callable[..., T] | None:
    """``function`` of PyTorch's, written in Python, as one that a ``TorchFunctionMode`` at work sees the inside of.

    Such functions begin by handing themselves to the mode. This one, a copy, goes on. None for all others.
    """
    if not isinstance(function, FunctionType) or function.__module__ not in _IN_PYTHON:
        return None
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names_of_copy = {**function.__globals__, **dict.fromkeys(names, lambda *_: False)}
    copy = FunctionType(
        function.__code__, names_of_copy, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
