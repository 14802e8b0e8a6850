"""Scores changed by a function of the score and its indices: FlexAttention's ``score_mod``.

A function does not declare which tensors it captures, but its operations reveal them: evaluated once without
gradients, any operand that requires one was captured. In backward, leaves stand in for these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ..common.errors import require
from .broadcasting import canonical_broadcast

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(score, batch, head, query, key)``, tensors that broadcast → what takes the score's place."""


def is_score_mod(function: Callable[..., Any]) -> bool:
    """True if the callable takes a score and four indices rather than two positions."""
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)

    def takes(count: int) -> bool:
        try:
            signature.bind(*[None] * count)
        except TypeError:
            return False
        return True

    return takes(5) and not takes(2)


def modified(function: ScoreMod, scores: Tensor, indices: Iterable[Tensor]) -> Tensor:
    """Apply the function to ``scores (b, h, i, j)``; shape and dtype stay."""
    found = function(scores, *indices)
    came = found.dtype if isinstance(found, Tensor) else type(found).__name__
    floating = isinstance(found, Tensor) and found.is_floating_point()
    require(floating, "attn_bias function's output", "a floating-point tensor", came)
    b, h, i, j = scores.shape
    return canonical_broadcast(found, (b, h, i, j), "attn_bias function's output").to(scores.dtype).expand_as(scores)


def captured_by(function: ScoreMod, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The captured tensors that require gradients, other than parameters if the function is a module.

    Raises ValueError where its output depends on one in a way that no other tensor can stand in for.
    """
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    own = set(function.parameters()) if isinstance(function, nn.Module) else set()
    found: dict[Tensor, None] = {}

    def note(tensor: Tensor) -> Tensor:
        # Without gradients nothing that the function makes asks for one.
        if tensor.requires_grad and tensor not in own:
            found[tensor] = None
        return tensor

    def evaluated() -> Tensor:
        return modified(function, torch.zeros(1, 1, 1, 1, dtype=dtype, device=device), [zero] * 4)

    with torch.no_grad(), _Exchange(note):
        evaluated()
    instead = stand_ins(tuple(found))
    known = {*own, *instead.values()}
    with torch.enable_grad(), exchanged(instead, known):
        value = evaluated()
    expected = "a function of which PyTorch's operators use the captured tensors"
    require(all(leaf in known for leaf in _leaves(value)), "attn_bias", expected, "one that hides some")
    return tuple(found)


def stand_ins(captured: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Leaves to stand in for captured tensors, so that hooks on those never see a partial gradient."""
    return {tensor: tensor.detach().requires_grad_() for tensor in captured}


def exchanged(instead: Mapping[Tensor, Tensor], known: Collection[Tensor]) -> AbstractContextManager[Any]:
    """Inside, operations get a captured tensor's stand-in when they are given the tensor.

    Raises RuntimeError at a leaf with a gradient that is neither one of these nor ``known``: the function captures
    others than it did, as those of a module that ``torch.func.functional_call`` lent for forward alone.
    """

    def other(tensor: Tensor) -> Tensor:
        chosen = instead.get(tensor, tensor)
        if chosen.is_leaf and chosen.requires_grad and chosen not in known:
            raise RuntimeError("attn_bias: in backward the function uses other tensors than it captured in forward")
        return chosen

    return _Exchange(other) if instead else nullcontext()


class _Exchange(TorchFunctionMode):
    """Inside, every operation gets ``other(tensor)`` for each tensor among its arguments."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.other = other

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*self._of(tuple(args)), **self._of(kwargs or {}))

    def _of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.other(value)
        if type(value) in (tuple, list):
            return type(value)(self._of(item) for item in value)
        return {name: self._of(item) for name, item in value.items()} if type(value) is dict else value


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The leaves that a gradient of ``value`` would reach."""
    seen: set[Node] = set()
    ahead = [get_gradient_edge(value).node] if value.requires_grad else []
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions if following is not None]
            if hasattr(node, "variable"):
                yield node.variable
