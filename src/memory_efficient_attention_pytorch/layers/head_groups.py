"""Compute attention as a sum of pieces: one group of heads after another, projections included.

Queries, keys, values, output and their cotangents exist for one group at a time. The norm before the projections is
applied to one slab of tokens at a time, in forward and backward, and its output never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.dry_run import each
from ..common.errors import require
from ..common.precision import compute_dtype, full_dtype, require_dtype_of
from ..common.products import Scratch, linear_into
from ..recompute.normed import Normed, slabs
from ..recompute.pieces import Add, Branch, Repetition
from .working_set import splits


class HeadGroup(NamedTuple):
    """Query heads ``heads`` and the key/value heads ``kv_heads`` that they use."""

    heads: slice
    kv_heads: slice

    @staticmethod
    def split(heads: int, kv_heads: int, groups: int) -> tuple[HeadGroup, ...]:
        """Return equal groups, each of whole sets of heads that share a key/value head, or a part of one such set.

        Raises ValueError if the heads cannot be split so.
        """
        share, size = heads // kv_heads, heads // groups
        expected = f"a number that splits {heads} heads evenly, {share} of which share each key/value head"
        require(groups in splits(heads, kv_heads), "head_chunks", expected, groups)
        starts = range(0, heads, size)
        return tuple(
            HeadGroup(slice(s, s + size), slice(s // share, max(1, size // share) + s // share)) for s in starts
        )


class _Source(NamedTuple):
    """Tokens to project (x after its norm, or a context), with the rows of the weights that project them."""

    tokens: Normed
    rows: tuple[tuple[Tensor, slice], ...]
    is_context: bool = False

    def weight(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([weight[rows] for weight, rows in self.rows]).to(dtype)


class HeadGroupBranch(Branch):
    """Computes ``to_out(attend(norm(x)))`` as a sum over groups of an attention module's heads.

    The module has plain projections ``to_q``, ``to_kv`` and ``to_out`` and attends with some heads at a time:
    ``attend(q, k, v, group=group, …)`` maps ``(b, heads, n, d)`` to the same shape.
    """

    overlapping = True

    def __init__(
        self,
        attention: nn.Module,
        groups: Sequence[HeadGroup],
        kwargs: Mapping[str, Any],
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__(attention, kwargs, norm)
        self.groups, self.single_piece = groups, len(groups) == 1

    def allocate(self, x: Tensor, value: Tensor) -> Tensor:
        # Partial sums over groups are kept in fp32 at least, as one product over all heads would.
        return value.new_zeros(*x.shape[:2], value.shape[-1], dtype=full_dtype(value.dtype))

    def compute(self, x: Tensor, kwargs: dict[str, Any], add: Add) -> None:
        self.module.check(x, **kwargs)
        for argument, tokens in (("x", x), ("context", kwargs.get("context"))):
            if tokens is not None:
                require_dtype_of(self.module.to_q.weight, argument, tokens)
        for part in self._parts(x, kwargs.pop("context", None)):
            heads = part.project()
            out = _tokens(self.module.attend(*heads, group=part.group, **kwargs))
            del heads
            part.emit(out, add)

    def compute_again(self, x: Tensor, kwargs: dict[str, Any], again: Repetition) -> None:
        for part in self._parts(x, kwargs.pop("context", None)):
            heads = [t.detach().requires_grad_() for t in part.project()]
            with torch.enable_grad():
                out = self.module.attend(*heads, group=part.group, **kwargs)
            values = _tokens(out.detach())
            if again.add is not None:
                part.emit(values, again.add)
            grad_out = part.through_output(values, again).unflatten(-1, (out.shape[1], -1)).transpose(1, 2)
            del values
            of_heads = again.sums.backward(out, grad_out, heads)
            del out, heads, grad_out
            part.through_projections(of_heads, again)

    def _parts(self, x: Tensor, context: Tensor | None) -> Iterator[_Projections]:
        scratch = Scratch(compute_dtype(x), x.device)
        tokens = (Normed(x, self.norm), None if context is None else Normed(context))
        # Results kept of each group add up, so a dry run must run the last group, which exists beside all others'.
        for group in each(self.groups, last=1 if self.module.keep_attention else 0):
            yield _Projections(self.module, group, *tokens, scratch)


class _Projections:
    """Computes one group's part of the projections, from tokens to heads and back, in buffers shared by all groups."""

    def __init__(self, module: Any, group: HeadGroup, x: Normed, context: Normed | None, scratch: Scratch) -> None:
        self.group, self.scratch, self.width, self.output = group, scratch, module.dim_head, module.to_out.weight
        self.columns = _scaled(group.heads, self.width)
        q = (module.to_q.weight, self.columns)
        k = (module.to_kv.weight, _scaled(group.kv_heads, self.width))
        v = (module.to_kv.weight, _scaled(group.kv_heads, self.width, module.kv_heads * self.width))
        own = (q, k, v) if context is None else (q,)
        self.sources = [_Source(x, own), *([] if context is None else [_Source(context, (k, v), is_context=True)])]

    def project(self) -> tuple[Tensor, ...]:
        """Return q, k and v of the group's heads ``(b, heads, tokens, d)``, views of one buffer per source."""
        found: list[Tensor] = []
        for number, source in enumerate(self.sources):
            x, weight = source.tokens.x, source.weight(self.scratch.dtype)
            buffer = self.scratch.take(f"projected {number}", *x.shape[:2], len(weight))
            for index in each(slabs(x)):
                rows = source.tokens.at(index).to(self.scratch.dtype).flatten(0, 1)
                linear_into(buffer[index].view(len(rows), len(weight)), rows, weight)
            sizes = [rows.stop - rows.start for _, rows in source.rows]
            found += [t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in buffer.split(sizes, -1)]
        return tuple(found)

    def emit(self, values: Tensor, add: Add) -> None:
        """Project ``values (b, n, heads·d)`` to the group's part of the output, passed to ``add`` slab by slab."""
        weight = self.output[:, self.columns].to(values.dtype)
        for index in each(slabs(values)):
            add(index, self.scratch.linear("slab", values[index], weight))

    def through_output(self, values: Tensor, again: Repetition) -> Tensor:
        """Backpropagate through the output projection; return the gradient of ``values``."""
        weight = self.output[:, self.columns].to(values.dtype)
        back = self.scratch.take("back", *values.shape)
        for index in each(slabs(values)):
            upstream = again.cotangent[index].to(values.dtype)
            rows = upstream.flatten(0, 1)
            linear_into(back[index].view(len(rows), weight.shape[1]), rows, weight.t())
            again.sums.add_product(self.output, upstream, values[index], (slice(None), self.columns))
        return back

    def through_projections(self, of_heads: list[Any], again: Repetition) -> None:
        """Backpropagate through the projections and the norm, slab by slab; consumes ``of_heads``."""
        for source in self.sources:
            mine = [of_heads.pop(0).transpose(1, 2) for _ in source.rows]
            x, weight = source.tokens.x, source.weight(self.scratch.dtype)
            for index in each(slabs(x)):
                upstream = self.scratch.take("joined", *x[index].shape[:2], len(weight))
                torch.cat([t[index].flatten(2) for t in mine], dim=-1, out=upstream)
                values = source.tokens.with_graph(index).to(upstream.dtype)
                start = 0
                for matrix, rows in source.rows:
                    stop = start + rows.stop - rows.start
                    again.sums.add_product(matrix, upstream[..., start:stop], values, rows)
                    start = stop
                if not (again.sums.wants(x) if source.is_context else source.tokens.passes_on(again)):
                    continue
                back = self.scratch.linear("slab", upstream, weight.t())
                if source.is_context:
                    again.sums.add(x, back, index)
                else:
                    source.tokens.backward(index, back, again)


def _scaled(heads: slice, width: int, offset: int = 0) -> slice:
    """Return the slice of features of some heads."""
    return slice(offset + heads.start * width, offset + heads.stop * width)


def _tokens(heads: Tensor) -> Tensor:
    """Merge heads: ``(b, heads, n, d)`` → ``(b, n, heads·d)``."""
    return heads.transpose(1, 2).flatten(2)
