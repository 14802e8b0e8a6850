"""Change scores by a function of the score and its indices: FlexAttention's ``score_mod``.

A function does not declare which tensors it captures, but its operations reveal them: when it is evaluated without
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
"""Called with ``(score, batch, head, query, key)``, tensors that broadcast; returns the new score."""


def is_score_mod(function: Callable[..., Any]) -> bool:
    """Return True if the callable takes a score and four indices rather than two positions."""
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)

    def takes(count: int) -> bool:
        try:
            signature.bind(*[None] * count)
        except TypeError:
            return False
        return True

    return takes(5) and not takes(2)


def modified(function: ScoreMod, scores: Tensor, indices: Iterable[Tensor]) -> Tensor:
    """Apply the function to ``scores (b, h, i, j)``; the result has their shape and dtype.

    Raises ValueError if the function returns something else than a floating-point tensor of a fitting shape.
    """
    found = function(scores, *indices)
    came = found.dtype if isinstance(found, Tensor) else type(found).__name__
    floating = isinstance(found, Tensor) and found.is_floating_point()
    require(floating, "attn_bias function's output", "a floating-point tensor", came)
    b, h, i, j = scores.shape
    return canonical_broadcast(found, (b, h, i, j), "attn_bias function's output").to(scores.dtype).expand_as(scores)


def captured_by(function: ScoreMod, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the captured tensors that require gradients, without parameters if the function is a module.

    Raises ValueError if its output depends on one that no stand-in can replace.
    """
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    own = set(function.parameters()) if isinstance(function, nn.Module) else set()
    found: dict[Tensor, None] = {}

    def note(tensor: Tensor) -> Tensor:
        # With gradients off, no result inside the function requires one.
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
    """Return leaves to stand in for captured tensors, so that hooks on those never see a partial gradient."""
    return {tensor: tensor.detach().requires_grad_() for tensor in captured}


def exchanged(instead: Mapping[Tensor, Tensor], known: Collection[Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which operations get stand-ins in place of captured tensors.

    Raises RuntimeError at a leaf with a gradient that is neither a stand-in nor ``known``: the function now uses other
    tensors than in forward, for example those of a module that ``torch.func.functional_call`` replaced only there.
    """

    def other(tensor: Tensor) -> Tensor:
        chosen = instead.get(tensor, tensor)
        if chosen.is_leaf and chosen.requires_grad and chosen not in known:
            raise RuntimeError("attn_bias: in backward the function uses other tensors than it captured in forward")
        return chosen

    return _Exchange(other) if instead else nullcontext()


class _Exchange(TorchFunctionMode):
    """Passes ``other(tensor)`` to every operation for each tensor among its arguments."""

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
    """Yield the leaves that a gradient of ``value`` would reach."""
    seen: set[Node] = set()
    ahead = [get_gradient_edge(value).node] if value.requires_grad else []
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions if following is not None]
            if hasattr(node, "variable"):
                yield node.variable
