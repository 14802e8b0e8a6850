"""The parameters, buffers, modes and hooks that a forward pass saw, for its recomputation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeGuard

from torch import Tensor, nn

from ..torch_internals.engine import version, version_attribute
from ..torch_internals.hooks import (
    forward_hooks,
    get_buffer,
    has_pre_hooks,
    put_buffer,
    put_forward_hooks,
    put_parameter,
    tensor_has_hooks,
)
from ..torch_internals.tensors import are_plain, is_fake


class SeenParameters:
    """Records where modules held their parameters during a forward pass, each parameter once.

    Backward differentiates what forward saw, even if the modules hold other parameters by then
    (``torch.func.functional_call``). A leaf that a module has as a plain attribute counts, too, and a weight of
    PyTorch's own modules that was computed from others. The caller keeps the tensors themselves: see :meth:`take`.
    """

    def __init__(self, modules: Iterable[nn.Module], *, attributes: bool = True) -> None:
        found: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        for part in parts if attributes else ():  # first, since the last tensor tells a dry run which module works
            for name, tensor in _plain_attributes(part):
                found.setdefault(tensor, []).append((part, name))
        for part in parts:
            for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                found.setdefault(parameter, []).append((part, name))
        self._places = list(found.values())
        self._tensors = tuple(found)

    def take(self) -> tuple[Tensor, ...]:
        """Return the parameters and release them."""
        tensors, self._tensors = self._tensors, ()
        return tensors

    def leaves(self, tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        """Return the leaves to differentiate in place of ``tensors``, those of :meth:`take`.

        Each is the parameter itself, or a stand-in if the modules hold another by now or if it has hooks, which must
        run once, on the whole gradient.
        """
        found = []
        for places, saved, need in zip(self._places, tensors, needed, strict=True):
            held = [getattr(module, name, None) for module, name in places]
            # A checkpoint returns another object for the same memory: threads that share the module must see its own.
            tensor = held[0] if held and _is_same(held[0], saved) else saved
            own = all(each is tensor for each in held) and not tensor_has_hooks(tensor)
            found.append(tensor if own else nn.Parameter(tensor.detach(), requires_grad=need))
        return found

    @contextmanager
    def held(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Put these leaves in place of the modules' parameters inside the context."""
        with ExitStack() as stack:
            for places, leaf in zip(self._places, leaves, strict=True):
                for module, name in places:
                    there, before = hasattr(module, name), getattr(module, name, None)
                    if before is not leaf:
                        stack.callback(*(put_parameter, module, name, before) if there else (delattr, module, name))
                        put_parameter(module, name, leaf)
            yield


def _is_same(held: object, saved: Tensor) -> TypeGuard[Tensor]:
    """Return True if both are one tensor, or share its memory and layout."""
    if held is saved or type(held) not in (Tensor, nn.Parameter) or not are_plain(saved) or is_fake(saved):
        return held is saved
    assert isinstance(held, Tensor)
    return held.is_set_to(saved)


def _plain_attributes(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's attributes that are neither parameters nor buffers, and that its forward may differentiate.

    Leaves, and what PyTorch's own modules hold: others may have stored a result there, whose graph is gone.
    """
    found = [(name, x) for name, x in vars(module).items() if isinstance(x, Tensor) and x.requires_grad]
    # What a hook computes before each forward (PyTorch's older weight_norm) is the last one's, and computed again.
    computed = type(module).__module__.startswith("torch.nn.") and not has_pre_hooks(module)
    return [(name, x) for name, x in found if x.is_leaf or computed]


class SeenModes:
    """Records which modules were in training during a forward pass: ``eval()`` may be called before backward."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        self._training = [(part, part.training) for part in parts]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put the modules into these modes inside the context."""
        with ExitStack() as stack:
            for part, training in self._training:
                if part.training is not training:
                    stack.callback(setattr, part, "training", part.training)
                    part.training = training
            yield


class SeenHooks:
    """Records hooks around modules' forward: some are there for one pass only, as peft's that say where to adapt.

    Those that come or go within the pass itself, as one that initialises at the first call, are not put back.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        self._hooks = [(part, forward_hooks(part)) for part in parts]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Run the forward pass inside."""
        yield
        self._hooks = [
            (
                part,
                [
                    {key: hook for key, hook in before.items() if key in after}
                    for before, after in zip(hooks, forward_hooks(part), strict=True)
                ],
            )
            for part, hooks in self._hooks
        ]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Run the recomputation inside, with these hooks and no others."""
        with ExitStack() as stack:
            for part, hooks in self._hooks:
                now = forward_hooks(part)
                if [list(kind) for kind in now] != [list(kind) for kind in hooks]:
                    stack.callback(put_forward_hooks, part, now)
                    put_forward_hooks(part, hooks)
            yield


_SMALL = 2**16


class SeenBuffers:
    """Keeps modules' buffers as they were before a forward pass that may change them.

    Batch norms update running statistics and spectral norms iterate, once, in forward: recomputation starts from the
    values that forward started from, and its changes are discarded. State kept elsewhere is not covered.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for part in dict.fromkeys(part for module in modules for part in module.modules()):
            for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
                self._places.setdefault(buffer, []).append((part, name))
        self._before: dict[Tensor, Tensor] = {}
        self._unchanged: dict[Tensor, int] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Run the forward pass inside; the previous value of each buffer that it changes in place is kept.

        Copies of small buffers are kept in any case: PyTorch's batch norm kernel does not count its in-place changes.
        """
        before = [(buffer, version(buffer), buffer.clone()) for buffer in self._places]
        yield
        small = math.inf if version_attribute() is None else _SMALL
        self._before = {b: copy for b, number, copy in before if b.numel() <= small or version(b) != number}
        self._unchanged = {b: number for b, number, _ in before if b not in self._before}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Run the recomputation inside, with the buffers as they were before forward.

        Raises RuntimeError, as autograd does, if one that forward left unchanged, too large for a copy, changed since.
        """
        for buffer, number in self._unchanged.items():
            if version(buffer) != number:
                module, name = self._places[buffer][0]
                raise RuntimeError(
                    f"{type(module).__name__}.{name}: a buffer that backward may need has been modified by an inplace "
                    "operation since forward"
                )
        with ExitStack() as stack:
            for buffer, places in self._places.items():
                value = self._before[buffer].clone() if buffer in self._before else buffer
                for module, name in places:
                    stack.callback(put_buffer, module, name, get_buffer(module, name))
                    put_buffer(module, name, value)
            yield
