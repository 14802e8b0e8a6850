"""The parameters that a forward pass saw, for its repetition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ..torch_internals.hooks import put_parameter, tensor_is_watched


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
