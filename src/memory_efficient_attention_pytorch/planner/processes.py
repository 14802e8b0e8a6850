"""Dry-run one process of several: its tokens, its shards of the parameters, no peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import ContextParallel
from ..torch_internals.trees import tree_leaves, tree_map_only
from .ledger import Ledger


def divided_tokens(num_tokens: int, size: int) -> ContextParallel:
    """Divide tokens over processes of which this, the first, receives most under causality; the others are absent.

    The ring and the exchange of heads are the real ones, without communication: received tensors are just allocated.
    """
    context = ContextParallel(dist.ProcessGroup(0, size))  # type: ignore[call-arg]
    context.shard(torch.empty(1, num_tokens, device="meta"))
    return context


class _Unit:
    """Parameters that are gathered together, and this process's shard of each."""

    def __init__(self, parameters: list[nn.Parameter], size: int) -> None:
        self.parameters = parameters
        self.shards = [_part(parameter, size) for parameter in parameters]
        self.numel = sum(shard.numel() for shard in self.shards)
        self.gathered: Tensor | None = None
        self.whole = self.differentiating = self.reduced = False


def _part(parameter: nn.Parameter, size: int) -> nn.Parameter:
    rows, *others = parameter.shape or (1,)
    return nn.Parameter(parameter.new_empty(-(-rows // size), *others), parameter.requires_grad)


class ShardedParameters:
    """Mimics the allocations of FSDP2 (``torch.distributed.fsdp.fully_shard``): a unit per block and one for the rest.

    A unit's parameters are gathered into one tensor and copied out before its forward and backward pass; in backward
    the next unit is gathered while one is computed, in forward that tensor lives until the next unit's is gathered.
    Gradients are copied into one tensor, which lives until the next unit's gradients exist; each process keeps its
    shard.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        self._size, self._order, self._units = size, list[_Unit](), list[_Unit]()
        self._arrived: Tensor | None = None
        self._leaving: Tensor | None = None
        known: set[nn.Parameter] = set()
        for module in (*model.get_submodule("layers").children(), model):
            parameters = [parameter for parameter in module.parameters() if parameter not in known]
            known.update(parameters)
            self._units.append(unit := _Unit(parameters, size))
            self._follow(module, unit)

    @property
    def shards(self) -> list[nn.Parameter]:
        return [shard for unit in self._units for shard in unit.shards]

    def charge_to(self, ledger: Ledger) -> None:
        """Count the shards in ``ledger``, and whole parameters only once gathered."""
        self._ledger = ledger
        ledger.enter("parameters", self.shards)
        for unit in self._units:
            ledger.enter("communication", unit.parameters)
            self._release(unit)
            ledger.gradients_of(unit.parameters)

    def finish(self) -> None:
        """Finish a backward pass: reduce the gradients of units whose inputs need none."""
        for unit in self._units:
            self._after_backward(unit)
            unit.differentiating = unit.reduced = False
        self._order.clear()
        self._leaving = None

    def _follow(self, module: nn.Module, unit: _Unit) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            self._gather(unit)
            self._arrived = None
            self._arrived = self._copy_out(unit)
            needing = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
            found = iter(_AfterBackward.apply(lambda: self._after_backward(unit), *needing) if needing else ())
            return tree_map_only(Tensor, lambda x: next(found) if x.requires_grad else x, (args, kwargs))

        def after(_: nn.Module, args: Any, output: Any) -> None:
            self._release(unit)
            self._order.append(unit)
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self._before_backward(unit))
            if unit is self._units[-1]:
                self._arrived = None

        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        module.register_forward_hook(after)

    def _before_backward(self, unit: _Unit) -> None:
        if unit.differentiating:
            return
        unit.differentiating = True
        self._gather(unit)
        self._copy_out(unit)
        place = self._order.index(unit)
        if place > 0:
            self._gather(self._order[place - 1])

    def _after_backward(self, unit: _Unit) -> None:
        if unit.reduced:
            return
        unit.reduced = True
        pairs = [(part, whole.grad) for part, whole in zip(unit.shards, unit.parameters, strict=True)]
        for parameter in unit.parameters:
            parameter.grad = None
        self._release(unit)
        self._leaving = None
        if all(gradient is None for _, gradient in pairs):
            return
        parts = [part for part, gradient in pairs if gradient is not None]
        sizes = [part.numel() for part in parts]
        self._leaving = self._made("communication", self._size * sum(sizes), parts[0])
        self._leaving.zero_()  # stands for the copy, during which the gradients still exist
        del pairs
        reduced = self._made("gradients", sum(sizes), parts[0])
        self._ledger.exchanges("reduce_scatter", (self._leaving,))
        for part, own in zip(parts, reduced.split(sizes), strict=True):
            if part.grad is None:
                part.grad = own.view(part.shape)
            else:
                part.grad += own.view(part.shape)

    def _gather(self, unit: _Unit) -> None:
        if unit.gathered is None and not unit.whole and unit.parameters:
            unit.gathered = self._made("communication", self._size * unit.numel, unit.parameters[0])
            self._ledger.exchanges("all_gather", (unit.gathered,))

    def _copy_out(self, unit: _Unit) -> Tensor | None:
        gathered, unit.gathered = unit.gathered, None
        if gathered is not None:
            for parameter in unit.parameters:
                self._ledger.exists(parameter, True)
            gathered.zero_()  # stands for the copy, during which both exist
            unit.whole = True
        return gathered

    def _release(self, unit: _Unit) -> None:
        for parameter in unit.parameters:
            self._ledger.exists(parameter, False)
        unit.whole = False

    def _made(self, category: str, numel: int, like: Tensor) -> Tensor:
        made = torch.empty(numel, dtype=like.dtype, device=like.device)
        self._ledger.belongs(category, made)
        return made


class _AfterBackward(torch.autograd.Function):
    """The identity; backward calls ``then``, once the unit's gradients exist."""

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.then()
        return None, *gradients
