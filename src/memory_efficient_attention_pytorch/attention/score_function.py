"""Scores changed by a function of the score and its indices: FlexAttention's ``score_mod``.

A function says nowhere which tensors it captures. Its graph does: it is evaluated at one place twice, and whatever both
graphs lead to was there before, and is to get a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from ..common.errors import require
from ..torch_internals.hooks import tensor_is_watched
from .broadcasting import canonical_broadcast

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(score, batch, head, query, key)``, tensors that broadcast → what takes the score's place."""
Edge = tuple[Node, int]


def is_score_mod(function: Callable[..., Any]) -> bool:
    """Does it take a score and four indices, and not two positions alone?"""
    signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)

    def takes(count: int) -> bool:
        try:
            signature.bind(*[None] * count)
        except TypeError:
            return False
        return True

    return takes(5) and not takes(2)


def modified(function: ScoreMod, scores: Tensor, indices: Iterable[Tensor]) -> Tensor:
    """``scores (b, h, i, j)`` as the function leaves them, in their shape and dtype."""
    found = function(scores, *indices)
    came = found.dtype if isinstance(found, Tensor) else type(found).__name__
    floating = isinstance(found, Tensor) and found.is_floating_point()
    require(floating, "attn_bias function's output", "a floating-point tensor", came)
    b, h, i, j = scores.shape
    return canonical_broadcast(found, (b, h, i, j), "attn_bias function's output").to(scores.dtype).expand_as(scores)


def captured_by(function: ScoreMod, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors with gradients that the function's output depends on, save the parameters of the module that it is.

    Leaves are found whatever they hang on; a tensor that is computed from others has to be in a closure, an argument's
    default, a global, a ``partial``, an attribute or a container of these.
    """
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)

    def evaluated() -> Tensor:
        return modified(function, torch.zeros(1, 1, 1, 1, dtype=dtype, device=device), [zero] * 4)

    with torch.enable_grad():
        first, second = evaluated(), evaluated()
    if not second.requires_grad:
        return ()
    before: set[Node] = set()
    _walk(first, before, lambda edge: False)
    edges: list[Edge] = []

    def was_there(edge: Edge) -> bool:
        if edge[0] in before:
            edges.append(edge)
        return edge[0] in before

    _walk(second, set(), was_there)
    leaves = {edge: edge[0].variable for edge in edges if hasattr(edge[0], "variable")}
    if len(leaves) < len(set(edges)):
        leaves |= {_edge(t): t for t in _held_by(function, set()) if t.requires_grad and not t.is_leaf}
    expected = "a function whose captured tensors are leaves, or in its closure, defaults, globals or attributes"
    require(all(edge in leaves for edge in edges), "attn_bias", expected, "one that computes with others")
    own = set(function.parameters()) if isinstance(function, nn.Module) else set()
    return tuple(leaves[edge] for edge in dict.fromkeys(edges) if leaves[edge] not in own)


def refuse_watched(tensors: Iterable[Tensor]) -> None:
    """Raise where hooks would see a captured tensor's gradient tile by tile; those of a module's parameters do not."""
    for tensor in tensors:
        watched = tensor_is_watched(tensor) or (tensor.retains_grad and not tensor.is_leaf)
        require(not watched, "attn_bias", "a module that holds tensors with hooks as parameters", "a captured tensor")


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _walk(tensor: Tensor, seen: set[Node], stops: Callable[[Edge], bool]) -> None:
    """Go through the graph of ``tensor``, noting its nodes in ``seen``, and not beyond an edge that ``stops``."""
    ahead = [_edge(tensor)]
    while ahead:
        edge = ahead.pop()
        if not stops(edge) and edge[0] not in seen:
            seen.add(edge[0])
            ahead += [(node, number) for node, number in edge[0].next_functions if node is not None]


def _held_by(holder: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that a function or an object holds, in whatever it holds."""
    if isinstance(holder, Tensor):
        yield holder
        return
    if id(holder) in seen or isinstance(holder, ModuleType | type):
        return
    seen.add(id(holder))
    parts: list[Any] = []
    if isinstance(holder, FunctionType):
        cells = (cell for cell in holder.__closure__ or () if _is_filled(cell))
        parts += [cell.cell_contents for cell in cells]
        parts += [holder.__defaults__, holder.__kwdefaults__]
        parts += [holder.__globals__[name] for name in holder.__code__.co_names if name in holder.__globals__]
    elif isinstance(holder, MethodType):
        parts += [holder.__self__, holder.__func__]
    elif isinstance(holder, partial):
        parts += [holder.func, holder.args, holder.keywords]
    elif isinstance(holder, dict):
        parts += holder.values()
    elif isinstance(holder, list | tuple | set | frozenset):
        parts += holder
    parts.append(getattr(holder, "__dict__", None))
    for part in parts:
        yield from _held_by(part, seen)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # the variable is not assigned yet
        return False
