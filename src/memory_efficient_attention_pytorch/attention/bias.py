"""Biases and functions of the score, evaluated per tile, and their gradients.

A tensor's or a module's values are added to the scores; a function of the score replaces them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..common.errors import require
from ..common.gradients import GradientSums, accumulator
from ..common.parameters import SeenParameters
from ..common.precision import full_dtype
from ..torch_internals.hooks import all_modules_have_hooks, module_has_hooks
from .broadcasting import EVERYTHING, canonical_broadcast, narrow_broadcast
from .mask_function import Place
from .score_function import captured_by, exchanged, is_score_mod, modified, stand_ins
from .visibility import Tile

BiasModule = Callable[..., Tensor]
"""Called with positions of queries ``(i,)`` and keys ``(j,)``; returns a tensor that broadcasts to ``(b, h, i, j)``. Or
called with a score and four indices, as ``ScoreMod``."""


@dataclass(frozen=True)
class Bias:
    """A validated bias for scores of ``shape = (b, h, n, m)``.

    values: a tensor of four dimensions or a module; None while the tensor is kept elsewhere.

    seen, parameters: where a module held which parameters in forward; backward differentiates those, whatever it holds
    by then (``torch.func.functional_call``). wants_gradient: for a tensor, whatever the grad mode, since a forward pass
    without gradients and its repetition with gradients must do the same; for a module, only with gradients on.
    of_score: values is a function of the score; ``captured`` are the tensors with gradients that it uses besides its
    parameters.
    """

    values: Tensor | BiasModule | None
    shape: tuple[int, int, int, int]
    wants_gradient: bool
    of_score: bool = False
    captured: tuple[Tensor, ...] = ()
    seen: SeenParameters | None = None
    parameters: tuple[Tensor, ...] = ()

    @staticmethod
    def of(values: Tensor | BiasModule, shape: tuple[int, int, int, int], q: Tensor) -> Bias:
        """Validate ``attn_bias`` for scores of ``shape`` on q's device."""
        if isinstance(values, Tensor):
            expected = "a floating-point dtype (a bool mask goes to mask)"
            require(values.is_floating_point(), "attn_bias", expected, values.dtype)
            require(values.device == q.device, "attn_bias", f"device {q.device}, that of q", values.device)
            return Bias(canonical_broadcast(values, shape, "attn_bias"), shape, values.requires_grad)
        expected = "a tensor, a module called with query and key positions or a function of a score and four indices"
        require(callable(values), "attn_bias", expected, type(values).__name__)
        expected = "a module that computes the same again, as backward does (attention has a dropout of its own)"
        require(not _drops(values), "attn_bias", expected, "a dropout in training")
        seen = SeenParameters([values], attributes=False) if isinstance(values, nn.Module) else None
        parameters = () if seen is None else seen.take()
        if is_score_mod(values):
            captured = () if 0 in shape else captured_by(values, q.device, full_dtype(q.dtype))
            return Bias(values, shape, False, True, captured, seen, parameters)
        trained = any(p.requires_grad for p in parameters)
        position = torch.zeros(1, dtype=torch.long, device=q.device)
        at_one = values(position, position)
        canonical_broadcast(at_one, (*shape[:2], 1, 1), "attn_bias module's output")
        expected = "a module that holds what needs a gradient as parameters"
        require(trained or not at_one.requires_grad, "attn_bias", expected, "a captured tensor")
        return Bias(values, shape, trained and torch.is_grad_enabled(), seen=seen, parameters=parameters)

    @property
    def tensor(self) -> Tensor | None:
        """The bias tensor, or None if the bias is a module or a function."""
        return self.values if isinstance(self.values, Tensor) else None

    @property
    def several_threads(self) -> bool:
        """Whether several threads may evaluate tiles at once."""
        return isinstance(self.values, Tensor) or serves_several_threads(self.values)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that receive gradients: the bias tensor, a module's parameters, or what a function captures."""
        return (*self.parameters, *self.captured) if self.tensor is None else (self.tensor,)

    def with_tensors(self, *tensors: Tensor | None) -> Bias:
        """Return the same bias with these tensors, in the order of :attr:`leaves`, or without any; a module is kept."""
        if self.values is None or self.tensor is not None:
            return replace(self, values=next(iter(tensors), None))
        count = len(tensors) - len(self.captured)
        return replace(self, parameters=tuple(t for t in tensors[:count] if t is not None) if tensors else ())

    def tile(self, tile: Tile, batch: slice, heads: slice, device: torch.device) -> Tensor:
        """Return the bias of one tile, broadcastable to ``(b, h, i, j)`` of a part of the batch and the heads."""
        if isinstance(self.values, Tensor):
            return narrow_broadcast(self.values, batch, heads, tile.queries, tile.keys)
        assert self.values is not None
        b, h, n, m = self.shape
        queries = torch.arange(tile.i0 + m - n, tile.i1 + m - n, device=device)
        keys = torch.arange(tile.j0, tile.j1, device=device)
        asked = {"heads": heads} if accepts_heads(self.values) else {}
        if asked:
            h, heads = len(range(h)[heads]), EVERYTHING
        values = self.values(queries, keys, **asked)
        values = canonical_broadcast(values, (b, h, len(queries), len(keys)), "attn_bias module's output")
        return narrow_broadcast(values, batch, heads)

    def modified(self, tile: Tile, batch: slice, heads: slice, scores: Tensor) -> Tensor:
        """Apply the function of the score to one tile's ``scores (b, h, i, j)``."""
        assert callable(self.values)
        b, h = self.shape[:2]
        place = Place(slice(*batch.indices(b)[:2]), slice(*heads.indices(h)[:2]), tile.queries, tile.keys)
        return modified(self.values, scores, place.indices(scores.device))


class BiasGradient:
    """Sums the gradient of a bias over tiles, in the bias's own broadcast shape.

    needed: for each of the bias's leaves. dtype: of the sums, if the leaf's is not wider.
    """

    def __init__(self, bias: Bias | None, needed: Sequence[bool], dtype: torch.dtype) -> None:
        self.bias = bias
        # With stand-ins for parameters with hooks, which must run once, on the whole gradient.
        self._seen = SeenParameters([]) if bias is None or bias.seen is None else bias.seen
        of_module = () if bias is None else bias.parameters
        self._leaves = self._seen.leaves(of_module, needed[: len(of_module)])
        self._stand_ins = stand_ins(() if bias is None else bias.captured)
        of_tensor = () if bias is None or bias.tensor is None else (bias.tensor,)
        leaves = [*of_tensor, *self._leaves, *self._stand_ins.values()]
        total = accumulator if dtype == torch.float32 else partial(torch.zeros_like, dtype=dtype)
        self._sums = GradientSums(leaves, needed, total)
        self.wanted = bool(self._sums.wanted)

    def held(self) -> AbstractContextManager[None]:
        """Put a module's parameters of the forward pass in place; everything else happens inside."""
        return self._seen.held(self._leaves)

    def add(self, tile: Tile, batch: slice, heads: slice, grad_scores: Tensor) -> None:
        """Accumulate the contribution of one tile, given the gradient of its scores ``(b, h, i, j)``."""
        assert self.bias is not None
        if self.bias.tensor is not None:
            total = self._sums.total(self.bias.tensor)
            assert total is not None
            target = self.bias.with_tensors(total).tile(tile, batch, heads, total.device)
            target += grad_scores.sum_to_size(target.shape)
            return
        with torch.enable_grad():
            values = self.bias.tile(tile, batch, heads, grad_scores.device)
        self._sums.backward(values, grad_scores.sum_to_size(values.shape).to(values.dtype))

    def modified(self, tile: Tile, batch: slice, heads: slice, scores: Tensor) -> Tensor:
        """Call :meth:`Bias.modified`, recording a graph for :meth:`through`."""
        assert self.bias is not None
        known = {*self._leaves, *self._stand_ins.values(), scores.requires_grad_()}
        with exchanged(self._stand_ins, known), torch.enable_grad():
            return self.bias.modified(tile, batch, heads, scores)

    def through(self, value: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
        """Backpropagate through :meth:`modified`: return the scores' gradient and accumulate those of the leaves."""
        (found,) = self._sums.backward(value, gradient, [scores])
        return torch.zeros_like(gradient) if found is None else found

    @property
    def results(self) -> list[Tensor | None]:
        """The gradient still to be added to each leaf, in its dtype; zeros where no tile contributed."""
        for leaf in self._sums.wanted:
            self._sums.total(leaf)
        return self._sums.results


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _drops(values: BiasModule) -> bool:
    """Return True if a part of the module is a dropout, which draws anew for each tile and again in backward."""
    parts = values.modules() if isinstance(values, nn.Module) else ()
    return any(isinstance(part, _DROPOUTS) and part.training and part.p > 0 for part in parts)


def is_score_function(bias: Tensor | BiasModule | None) -> TypeGuard[BiasModule]:
    """Return True for a function of the score, False for a bias that is added to it."""
    return callable(bias) and not isinstance(bias, Tensor) and is_score_mod(bias)


def refuse_captured(bias: Tensor | BiasModule | None, device: torch.device) -> None:
    """Raise if a function of the score captures tensors that recomputation in backward would not know about."""
    if is_score_function(bias) and torch.is_grad_enabled():
        expected = "a module that holds what needs a gradient as parameters, in head groups and reversible blocks"
        require(not captured_by(bias, device, torch.float32), "attn_bias", expected, "a captured tensor")


def bias_of_heads(bias: BiasModule, heads: slice) -> nn.Module:
    """Restrict a bias module or a function of the score to some of its heads."""
    return _ScoreOfHeads(bias, heads.start) if is_score_mod(bias) else BiasOfHeads(bias, heads)


class _ScoreOfHeads(nn.Module):
    def __init__(self, function: BiasModule, first: int) -> None:
        super().__init__()
        self.function, self.first = function, first

    def forward(self, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.function(score, batch, head + self.first, query, key)


class BiasOfHeads(nn.Module):
    """Restricts a bias module to some of its heads."""

    def __init__(self, bias: BiasModule, heads: slice) -> None:
        super().__init__()
        self.bias, self.heads = bias, heads

    def forward(self, query_positions: Tensor, key_positions: Tensor, heads: slice = slice(None)) -> Tensor:
        wanted = range(self.heads.start, self.heads.stop)[heads]
        chosen = slice(wanted.start, wanted.stop)
        if accepts_heads(self.bias):
            return self.bias(query_positions, key_positions, heads=chosen)
        values = self.bias(query_positions, key_positions)
        return values[..., chosen, :, :] if values.dim() >= 3 and values.shape[-3] > 1 else values


def serves_several_threads(bias: object) -> bool:
    """Return True if the module's class declares ``several_threads`` and the module has no hooks."""
    if not isinstance(bias, nn.Module) or module_has_hooks(bias) or all_modules_have_hooks():
        return False
    of_heads = isinstance(bias, BiasOfHeads)
    return serves_several_threads(bias.bias) if of_heads else vars(type(bias)).get("several_threads", False) is True


def accepts_heads(bias: BiasModule) -> bool:
    """Return True if the module can evaluate only some heads: its ``forward`` takes a slice as ``heads``."""
    call = getattr(bias, "forward", bias)
    return "heads" in inspect.signature(call).parameters
