"""Attention as a sum of pieces: one group of heads after another, projections included.

A group's queries, keys, values, output and their cotangents are all that exists of it at a time. The norm before the
projections is applied to a slab of tokens where it is needed, forward and backward, and never held as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import require
from .pieces import Add, Branch, Index, vector_jacobian_product

if TYPE_CHECKING:
    from .memory_efficient_attention import Attention

# Normed values and the projections' cotangents are held for one slab of tokens at a time: this part of all of them,
# but not so few that the matrix products suffer.
SLAB_PART, SLAB_MINIMUM = 1 / 16, 512


class HeadGroup(NamedTuple):
    """Query heads ``heads`` and the key/value heads ``kv_heads`` that they read."""

    heads: slice
    kv_heads: slice

    @staticmethod
    def split(heads: int, kv_heads: int, groups: int) -> tuple[HeadGroup, ...]:
        """Equal groups, each of whole sets of heads that share a key/value head, or a part of one such set."""
        share = heads // kv_heads
        size = heads // groups if heads % groups == 0 else 0
        fits = size > 0 and (size % share == 0 or share % size == 0)
        expected = f"a number that splits {heads} heads evenly, {share} of which share each key/value head"
        require(fits, "head_chunks", expected, groups)
        starts = range(0, heads, size)
        return tuple(
            HeadGroup(slice(s, s + size), slice(s // share, max(1, size // share) + s // share)) for s in starts
        )


def slabs(x: Tensor) -> Iterator[Index]:
    """Slices of the first two dimensions of ``(b, n, …)``, each contiguous: a slab of tokens."""
    b, n = x.shape[:2]
    size = max(SLAB_MINIMUM, math.ceil(b * n * SLAB_PART))
    if n > size:
        for i in range(b):
            for start in range(0, n, size):
                yield slice(i, i + 1), slice(start, min(start + size, n))
        return
    rows = max(1, size // max(n, 1))
    for start in range(0, b, rows):
        yield slice(start, min(start + rows, b)), slice(None)


class _Source(NamedTuple):
    """Tokens that are projected: x after its norm, or a context; with the rows of the weights that project them."""

    tokens: Tensor
    norm: nn.Module | None
    rows: tuple[tuple[Tensor, slice], ...]

    def weight(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([weight[rows] for weight, rows in self.rows]).to(dtype)


class HeadGroupBranch(Branch):
    """``to_out(attend(norm(x)))`` as a sum over groups of heads."""

    overlapping = True

    def __init__(self, attention: Attention, norm: nn.Module | None, kwargs: Mapping[str, Any]) -> None:
        modules = [attention] if norm is None else [norm, attention]
        super().__init__(attention, modules, kwargs)
        self.attention, self.norm = attention, norm

    def allocate(self, x: Tensor, value: Tensor) -> Tensor:
        # Partial sums over groups are kept in fp32 at least, as one product over all heads would.
        dtype = torch.promote_types(value.dtype, torch.float32)
        return value.new_zeros(*x.shape[:2], value.shape[-1], dtype=dtype)

    def run(self, x: Tensor, inputs: Sequence[Tensor], add: Add) -> None:
        kwargs = self.kwargs(inputs)
        context = kwargs.pop("context", None)
        for group in self.attention.head_groups:
            heads = self._project(self._sources(x, context, group), group)
            out = _tokens(self.attention.attend(*heads, group=group, **kwargs))
            del heads
            self._emit(out, group, add)

    def differentiate(
        self,
        x: Tensor,
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        cotangent: Tensor,
        add: Add | None,
        add_gradient: Add | None,
    ) -> list[Tensor | None]:
        leaves = self.leaves(inputs, needed)
        kwargs = self.kwargs(leaves)
        context = kwargs.pop("context", None)
        grads = _Gradients(leaves, needed, context, add_gradient)
        for group in self.attention.head_groups:
            sources = self._sources(x, context, group)
            heads = [t.requires_grad_() for t in self._project(sources, group)]
            with torch.enable_grad():
                out = self.attention.attend(*heads, group=group, **kwargs)
            values = _tokens(out.detach())
            if add is not None:
                self._emit(values, group, add)
            grad_values = self._through_output(values, cotangent, group, grads)
            del values
            of_heads = grads.through_core(out, heads, _heads(grad_values, out))
            del out, heads, grad_values
            self._through_projections(sources, of_heads, grads)
        return grads.totals

    def _sources(self, x: Tensor, context: Tensor | None, group: HeadGroup) -> list[_Source]:
        attention, width = self.attention, self.attention.dim_head
        half = attention.kv_heads * width
        q = (attention.to_q.weight, _scaled(group.heads, width))
        k = (attention.to_kv.weight, _scaled(group.kv_heads, width))
        v = (attention.to_kv.weight, _scaled(group.kv_heads, width, half))
        if context is None:
            return [_Source(x, self.norm, (q, k, v))]
        return [_Source(x, self.norm, (q,)), _Source(context, None, (k, v))]

    def _project(self, sources: Sequence[_Source], group: HeadGroup) -> tuple[Tensor, ...]:
        """q, k and v of the group's heads ``(b, heads, tokens, d)``, views of one buffer per source."""
        found: list[Tensor] = []
        for source in sources:
            tokens = source.tokens
            dtype = _compute_dtype(tokens)
            weight = source.weight(dtype)
            buffer = tokens.new_empty(*tokens.shape[:2], len(weight), dtype=dtype)
            for index in slabs(tokens):
                normed = tokens[index] if source.norm is None else source.norm(tokens[index])
                buffer[index] = F.linear(normed.to(dtype), weight)
            sizes = [rows.stop - rows.start for _, rows in source.rows]
            found += [t.unflatten(-1, (-1, self.attention.dim_head)).transpose(1, 2) for t in buffer.split(sizes, -1)]
        return tuple(found)

    def _emit(self, values: Tensor, group: HeadGroup, add: Add) -> None:
        columns = _scaled(group.heads, self.attention.dim_head)
        weight = self.attention.to_out.weight[:, columns].to(values.dtype)
        for index in slabs(values):
            add(index, F.linear(values[index], weight))

    def _through_output(self, values: Tensor, cotangent: Tensor, group: HeadGroup, grads: _Gradients) -> Tensor:
        """Back through the output projection: the gradient of ``values (b, n, heads·d)``."""
        columns = _scaled(group.heads, self.attention.dim_head)
        output = self.attention.to_out.weight
        weight = output[:, columns].to(values.dtype)
        total = grads.total(output)
        back = torch.empty_like(values)
        for index in slabs(values):
            upstream = cotangent[index].to(values.dtype)
            back[index] = upstream @ weight
            if total is not None:
                _accumulate(total[:, columns], upstream, values[index])
        return back

    def _through_projections(self, sources: Sequence[_Source], of_heads: list[Tensor], grads: _Gradients) -> None:
        """Back through the projections and the norm, slab by slab; consumes ``of_heads``."""
        for source in sources:
            mine = [_tokens(of_heads.pop(0)) for _ in source.rows]
            weight = source.weight(mine[0].dtype)
            for index in slabs(source.tokens):
                upstream = torch.cat([t[index] for t in mine], dim=-1)
                piece = source.tokens[index].detach().requires_grad_(source.norm is not None)
                with torch.enable_grad():
                    normed = piece if source.norm is None else source.norm(piece)
                values = normed.detach().to(upstream.dtype)
                start = 0
                for matrix, rows in source.rows:
                    total, size = grads.total(matrix), rows.stop - rows.start
                    if total is not None:
                        _accumulate(total[rows], upstream[..., start : start + size], values)
                    start += size
                grads.through_norm(index, source, piece, normed, upstream @ weight)


class _Gradients:
    """Where the gradients of a pass over all groups gather."""

    def __init__(
        self, leaves: Sequence[Tensor], needed: Sequence[bool], context: Tensor | None, add_gradient: Add | None
    ) -> None:
        self._places = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._needed, self._leaves = needed, leaves
        self._totals: list[Tensor | None] = [None] * len(leaves)
        self._context, self._add_gradient = context, add_gradient

    def total(self, leaf: Tensor) -> Tensor | None:
        """The accumulator of a leaf (fp32 at least), None where no gradient is wanted."""
        place = self._places[id(leaf)]
        if self._needed[place] and self._totals[place] is None:
            dtype = torch.promote_types(leaf.dtype, torch.float32)
            self._totals[place] = torch.zeros_like(leaf, dtype=dtype, memory_format=torch.contiguous_format)
        return self._totals[place]

    @property
    def totals(self) -> list[Tensor | None]:
        """One gradient per leaf, in its dtype."""
        pairs = zip(self._leaves, self._totals, strict=True)
        return [None if total is None else total.to(leaf.dtype) for leaf, total in pairs]

    def through_core(self, out: Tensor, heads: list[Tensor], grad_out: Tensor) -> list[Tensor]:
        """Gradients of q, k, v; those of a bias or of the module's own scale are added to the totals."""
        others = [leaf for leaf, need in zip(self._leaves, self._needed, strict=True) if need]
        found = vector_jacobian_product(out, [*heads, *others], grad_out)
        for leaf, grad in zip(others, found[len(heads) :], strict=True):
            self._add(leaf, grad)
        return [g for g in found[: len(heads)] if g is not None]

    def through_norm(self, index: Index, source: _Source, piece: Tensor, normed: Tensor, upstream: Tensor) -> None:
        upstream = upstream.to(normed.dtype)
        if source.norm is None:
            if source.tokens is self._context:
                total = self.total(source.tokens)
                if total is not None:
                    total[index].add_(upstream)
            elif self._add_gradient is not None:
                self._add_gradient(index, upstream)
            return
        parameters = [p for p in source.norm.parameters() if self._needed[self._places[id(p)]]]
        of_piece, *of_norm = vector_jacobian_product(normed, [piece, *parameters], upstream)
        for parameter, grad in zip(parameters, of_norm, strict=True):
            self._add(parameter, grad)
        if self._add_gradient is not None and of_piece is not None:
            self._add_gradient(index, of_piece)

    def _add(self, leaf: Tensor, grad: Tensor | None) -> None:
        if grad is not None:
            total = self.total(leaf)
            assert total is not None
            total.add_(grad)


def _accumulate(total: Tensor, upstream: Tensor, values: Tensor) -> None:
    """``total += upstreamᵀ values``, over tokens."""
    upstream, values = upstream.flatten(0, 1), values.flatten(0, 1)
    if total.dtype == values.dtype:
        total.addmm_(upstream.t(), values)
    else:
        total.add_(upstream.t() @ values)


def _scaled(heads: slice, width: int, offset: int = 0) -> slice:
    """The features of some heads."""
    return slice(offset + heads.start * width, offset + heads.stop * width)


def _tokens(heads: Tensor) -> Tensor:
    """``(b, heads, n, d)`` → ``(b, n, heads·d)``."""
    return heads.transpose(1, 2).flatten(2)


def _heads(tokens: Tensor, like: Tensor) -> Tensor:
    """``(b, n, heads·d)`` → ``(b, heads, n, d)``."""
    return tokens.unflatten(-1, (like.shape[1], like.shape[3])).transpose(1, 2)


def _compute_dtype(tokens: Tensor) -> torch.dtype:
    """What a linear layer computes in: autocast's dtype where it is on, else the tokens' own."""
    kind = tokens.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and tokens.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tokens.dtype
