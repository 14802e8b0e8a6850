"""Attention as a sum of pieces: one group of heads after another, projections included.

A group's queries, keys, values, output and their cotangents are all that exists of it at a time. The norm before the
projections is applied to a slab of tokens where it is needed, forward and backward, and never held as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.dry_run import each
from ..common.errors import require
from ..common.precision import compute_dtype, full_dtype
from ..common.products import Scratch, linear_into
from ..recompute.normed import Normed, slabs
from ..recompute.pieces import Add, Branch, Repetition


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


class _Source(NamedTuple):
    """Tokens that are projected: x after its norm, or a context; with the rows of the weights that project them."""

    tokens: Normed
    rows: tuple[tuple[Tensor, slice], ...]
    is_context: bool = False

    def weight(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([weight[rows] for weight, rows in self.rows]).to(dtype)


class HeadGroupBranch(Branch):
    """``to_out(attend(norm(x)))`` as a sum over the ``head_groups`` of an attention module.

    The module has plain projections ``to_q``, ``to_kv`` and ``to_out`` and attends with some heads at a time:
    ``attend(q, k, v, group=group, …)`` of ``(b, heads, n, d)`` → the same shape.
    """

    overlapping = True

    def __init__(self, attention: nn.Module, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> None:
        super().__init__(attention, kwargs, norm)
        self.single_piece = len(self.module.head_groups) == 1

    def allocate(self, x: Tensor, value: Tensor) -> Tensor:
        # Partial sums over groups are kept in fp32 at least, as one product over all heads would.
        return value.new_zeros(*x.shape[:2], value.shape[-1], dtype=full_dtype(value.dtype))

    def compute(self, x: Tensor, kwargs: dict[str, Any], add: Add) -> None:
        self.module.check(x, **kwargs)
        context = kwargs.pop("context", None)
        scratch = Scratch(compute_dtype(x), x.device)
        for group in self._groups():
            heads = self._project(self._sources(x, context, group), scratch)
            out = _tokens(self.module.attend(*heads, group=group, **kwargs))
            del heads
            self._emit(out, group, scratch, add)

    def compute_again(self, x: Tensor, kwargs: dict[str, Any], again: Repetition) -> None:
        context = kwargs.pop("context", None)
        scratch = Scratch(compute_dtype(x), x.device)
        for group in self._groups():
            sources = self._sources(x, context, group)
            heads = [t.detach().requires_grad_() for t in self._project(sources, scratch)]
            with torch.enable_grad():
                out = self.module.attend(*heads, group=group, **kwargs)
            values = _tokens(out.detach())
            if again.add is not None:
                self._emit(values, group, scratch, again.add)
            grad_values = self._through_output(values, group, scratch, again)
            del values
            of_heads = again.sums.backward(out, _heads(grad_values, out), heads)
            del out, heads, grad_values
            self._through_projections(sources, of_heads, scratch, again)

    def _groups(self) -> Iterable[HeadGroup]:
        # What is kept of each group adds up: the last finds that of all others, as in the whole loop.
        return each(self.module.head_groups, last=1 if self.module.keep_attention else 0)

    def _sources(self, x: Tensor, context: Tensor | None, group: HeadGroup) -> list[_Source]:
        attention, width = self.module, self.module.dim_head
        half = attention.kv_heads * width
        q = (attention.to_q.weight, _scaled(group.heads, width))
        k = (attention.to_kv.weight, _scaled(group.kv_heads, width))
        v = (attention.to_kv.weight, _scaled(group.kv_heads, width, half))
        normed = Normed(x, self.norm)
        if context is None:
            return [_Source(normed, (q, k, v))]
        return [_Source(normed, (q,)), _Source(Normed(context), (k, v), is_context=True)]

    def _project(self, sources: Sequence[_Source], scratch: Scratch) -> tuple[Tensor, ...]:
        """q, k and v of the group's heads ``(b, heads, tokens, d)``, views of one buffer per source."""
        found: list[Tensor] = []
        for number, source in enumerate(sources):
            x = source.tokens.x
            weight = source.weight(scratch.dtype)
            buffer = scratch.take(f"projected {number}", *x.shape[:2], len(weight))
            for index in each(slabs(x)):
                rows = source.tokens.at(index).to(scratch.dtype).flatten(0, 1)
                linear_into(buffer[index].view(len(rows), len(weight)), rows, weight)
            sizes = [rows.stop - rows.start for _, rows in source.rows]
            found += [t.unflatten(-1, (-1, self.module.dim_head)).transpose(1, 2) for t in buffer.split(sizes, -1)]
        return tuple(found)

    def _emit(self, values: Tensor, group: HeadGroup, scratch: Scratch, add: Add) -> None:
        columns = _scaled(group.heads, self.module.dim_head)
        weight = self.module.to_out.weight[:, columns].to(values.dtype)
        for index in each(slabs(values)):
            add(index, scratch.linear("slab", values[index], weight))

    def _through_output(self, values: Tensor, group: HeadGroup, scratch: Scratch, again: Repetition) -> Tensor:
        """Back through the output projection: the gradient of ``values (b, n, heads·d)``."""
        columns = _scaled(group.heads, self.module.dim_head)
        output = self.module.to_out.weight
        weight = output[:, columns].to(values.dtype)
        back = scratch.take("back", *values.shape)
        for index in each(slabs(values)):
            upstream = again.cotangent[index].to(values.dtype)
            rows = upstream.flatten(0, 1)
            linear_into(back[index].view(len(rows), weight.shape[1]), rows, weight.t())
            again.sums.add_product(output, upstream, values[index], (slice(None), columns))
        return back

    def _through_projections(
        self, sources: Sequence[_Source], of_heads: list[Any], scratch: Scratch, again: Repetition
    ) -> None:
        """Back through the projections and the norm, slab by slab; consumes ``of_heads``."""
        for source in sources:
            mine = [of_heads.pop(0).transpose(1, 2) for _ in source.rows]
            weight = source.weight(scratch.dtype)
            x = source.tokens.x
            for index in each(slabs(x)):
                upstream = scratch.take("joined", *x[index].shape[:2], len(weight))
                torch.cat([t[index].flatten(2) for t in mine], dim=-1, out=upstream)
                values = source.tokens.with_graph(index).to(upstream.dtype)
                start = 0
                for matrix, rows in source.rows:
                    stop = start + rows.stop - rows.start
                    again.sums.add_product(matrix, upstream[..., start:stop], values, rows)
                    start = stop
                back = scratch.linear("slab", upstream, weight.t())
                if source.is_context:
                    again.sums.add(x, back, index)
                else:
                    source.tokens.backward(index, back, again)


def _scaled(heads: slice, width: int, offset: int = 0) -> slice:
    """The features of some heads."""
    return slice(offset + heads.start * width, offset + heads.stop * width)


def _tokens(heads: Tensor) -> Tensor:
    """``(b, heads, n, d)`` → ``(b, n, heads·d)``."""
    return heads.transpose(1, 2).flatten(2)


def _heads(tokens: Tensor, like: Tensor) -> Tensor:
    """``(b, n, heads·d)`` → ``(b, heads, n, d)``."""
    heads: Tensor = tokens.unflatten(-1, (like.shape[1], like.shape[3]))
    return heads.transpose(1, 2)
