"""The parameters and buffers that a forward pass saw, for its repetition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..torch_internals.engine import version, version_attribute
from ..torch_internals.hooks import get_buffer, put_buffer, put_parameter, tensor_is_watched


class SeenParameters:
    """The places of some modules' parameters at the time of a forward pass, each parameter once.

    Backward differentiates what forward saw, although the modules may hold others by then
    (``torch.func.functional_call``). The tensors themselves are the caller's to keep: see :meth:`take`.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for part in dict.fromkeys(part for module in modules for part in module.modules()):
            for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                found.setdefault(parameter, []).append((part, name))
        self._places = list(found.values())
        self._tensors = tuple(found)

    def take(self) -> tuple[Tensor, ...]:
        """The parameters, of which this object then lets go."""
        tensors, self._tensors = self._tensors, ()
        return tensors

    def leaves(self, tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        """What is to be differentiated in place of ``tensors``, those of :meth:`take`.

        Each is the parameter itself, or a stand-in where the modules hold another by now or it has hooks: those are to
        run once, on the whole gradient, in the pass that receives it.
        """
        return [
            tensor
            if all(getattr(module, name, None) is tensor for module, name in places) and not tensor_is_watched(tensor)
            else nn.Parameter(tensor.detach(), requires_grad=need)
            for places, tensor, need in zip(self._places, tensors, needed, strict=True)
        ]

    @contextmanager
    def held(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the modules have these leaves for their parameters."""
        with ExitStack() as stack:
            for places, leaf in zip(self._places, leaves, strict=True):
                for module, name in places:
                    before = getattr(module, name)
                    if before is not leaf:
                        stack.callback(put_parameter, module, name, before)
                        put_parameter(module, name, leaf)
            yield


_SMALL = 2**16


class SeenBuffers:
    """The buffers of some modules as a forward pass found them, which may change them as it goes.

    Batch norms count what they see and spectral norms go on with their power iteration, once in forward: the repetition
    starts from what forward started from, and what it changes is forgotten. Of state elsewhere nothing is known.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for part in dict.fromkeys(part for module in modules for part in module.modules()):
            for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
                self._places.setdefault(buffer, []).append((part, name))
        self._before: dict[Tensor, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside is the forward pass. Of each buffer that it changes in place the value before is kept.

        Of a small one in any case: what PyTorch's kernel for batch norms changes it does not count as changed.
        """
        before = [(buffer, version(buffer), buffer.clone()) for buffer in self._places]
        yield
        small = math.inf if version_attribute() is None else _SMALL
        self._before = {b: copy for b, number, copy in before if b.numel() <= small or version(b) != number}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside is the repetition, for which the modules have buffers of the values before."""
        with ExitStack() as stack:
            for buffer, places in self._places.items():
                value = self._before[buffer].clone() if buffer in self._before else buffer
                for module, name in places:
                    stack.callback(put_buffer, module, name, get_buffer(module, name))
                    put_buffer(module, name, value)
            yield
