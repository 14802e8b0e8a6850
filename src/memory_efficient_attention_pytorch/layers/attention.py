"""Multi-head attention modules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..attention.bias import BiasModule, bias_of_heads, is_score_function, refuse_captured
from ..attention.decision import BACKENDS, KEEPS_FOR_ITSELF, Decision, decide
from ..attention.functional import dot_product_attention
from ..attention.mask_function import mask_function
from ..attention.visibility import Mask, window_sides
from ..common.compiled import eagerly
from ..common.divided import active
from ..common.errors import require, require_positive_int, require_probability
from ..recompute.by_hand import reason_against
from ..recompute.kept import KeptResults
from ..recompute.pieces import Branch, in_pieces
from .cache import KVCache
from .head_groups import HeadGroup, HeadGroupBranch
from .positions import rotate
from .working_set import head_chunks_for


class Attention(nn.Module):
    """Computes multi-head attention, ``to_out(attend(to_q(x), to_kv(context)))``, exactly, in memory linear in tokens.

    Args:
        dim: width of x, context and output.
        heads, dim_head: query heads and the width of each.
        dropout: probability of dropping a normalised attention weight, in training.
        causal: query i sees keys ``j <= i + m − n``.
        memory_efficient: accepted for code written for version 0.1, where it chose between an n × n matrix and tiles.
            Both values give the same result here, without an n × n matrix (``backend="naive"`` makes one).
        q_bucket_size, k_bucket_size: sides of a tile; ``forward`` may override them for a call.
        kv_heads: key/value heads, a divisor of ``heads`` (None: as many; 1: multi-query attention).
        window: keys before and after its own position that a query sees: an integer for both, or a pair.
        head_chunks: split the heads into this many groups and compute one group at a time, in forward and backward.
            Then only x is kept for backward, and the memory of q, k, v and output falls with the number of groups. A
            group should have at least as many heads × batch as there are CPU threads. 1: all at once. None: chosen at
            each call from shapes and threads so that a group's working set stays small (see :mod:`.working_set`).
        keep_attention: where backward recomputes activations (head groups, reversible blocks), keep attention's output
            and log-sum-exp, ``b·n·heads·(dim_head + 1)`` elements, instead of recomputing them: True on the device,
            ``"cpu"`` in host memory, which is the same for a model on the CPU. Results are the same.
        backend: see :func:`dot_product_attention`.

    Raises:
        ValueError: an argument outside its range, head counts that do not divide one another.

    Weights: ``to_q (heads·dim_head, dim)``, ``to_kv (2·kv_heads·dim_head, dim)`` keys first, ``to_out (dim,
    heads·dim_head)``, no biases.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import Attention
        >>> attention = Attention(dim=64, heads=4, dim_head=16, causal=True, window=(128, 0))
        >>> x = torch.randn(2, 300, 64)
        >>> attention(x).shape
        torch.Size([2, 300, 64])
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        causal: bool = False,
        memory_efficient: bool = False,
        q_bucket_size: int = 512,
        k_bucket_size: int = 1024,
        kv_heads: int | None = None,
        window: int | tuple[int | None, int | None] | None = None,
        head_chunks: int | None = None,
        keep_attention: bool | str = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        counts = {"dim": dim, "heads": heads, "dim_head": dim_head, "kv_heads": kv_heads}
        counts |= {"q_bucket_size": q_bucket_size, "k_bucket_size": k_bucket_size}
        for argument, value in (counts | ({} if head_chunks is None else {"head_chunks": head_chunks})).items():
            require_positive_int(argument, value)
        require(heads % kv_heads == 0, "kv_heads", f"a divisor of heads = {heads}", kv_heads)
        require_probability("dropout", dropout)
        require(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", repr(backend))
        window_sides(window)
        known = isinstance(keep_attention, bool) or keep_attention == "cpu"
        require(known, "keep_attention", "False, True or 'cpu'", repr(keep_attention))
        fits = not keep_attention or backend not in KEEPS_FOR_ITSELF
        expected = f"False with backend {backend!r}, which keeps what its backward needs by itself"
        require(fits, "keep_attention", expected, repr(keep_attention))
        self.keep_attention = keep_attention
        self.dim, self.heads, self.kv_heads, self.dim_head = dim, heads, kv_heads, dim_head
        self.dropout, self.causal, self.window, self.backend = dropout, causal, window, backend
        self.memory_efficient = memory_efficient
        self.q_bucket_size, self.k_bucket_size = q_bucket_size, k_bucket_size
        # None: as many as :meth:`_groups` chooses.
        self.head_groups = None if head_chunks is None else HeadGroup.split(heads, kv_heads, head_chunks)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Mask | None = None,
        attn_bias: Tensor | BiasModule | None = None,
        memory_efficient: bool | None = None,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
        *,
        document_ids: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from x ``(b, n, dim)`` to context ``(b, m, dim)`` (default x); return ``(b, n, dim)``.

        mask, attn_bias, document_ids: as for :func:`dot_product_attention`. rotary: cosines and sines of the tokens'
        positions (see :class:`RotaryEmbedding`), for self-attention. cache: keys and values of earlier tokens; mask,
        which must then be a tensor, and document_ids cover those too.

        Raises ValueError for wrong shapes and for arguments that do not go together.
        """
        self.check(x, context, rotary, cache, mask, attn_bias)
        given: dict[str, Any] = {"mask": mask, "attn_bias": attn_bias, "document_ids": document_ids, "rotary": rotary}
        given |= {"cache": cache, "q_bucket_size": q_bucket_size, "k_bucket_size": k_bucket_size}
        given = _shared_by_groups(given)
        if cache is None:
            groups = self._groups(x, context)
            if len(groups) > 1:
                reason = self._against_groups()
                if reason is None:
                    return eagerly(in_pieces, self, x, {"context": context, **given})
                whole = f"{type(self).__name__} is computed as a whole, not in pieces"
                warnings.warn(f"head_chunks: {whole}: of {reason}", stacklevel=2)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.to_kv(x if context is None else context)
        k, v = kv.unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.attend(q, k, v, **given)
        merged: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return merged

    def as_branch(self, x: Tensor, kwargs: Mapping[str, Any], norm: nn.Module | None = None) -> Branch:
        """Return pieces over groups of heads, or a single piece if the projections must run their own ``forward``."""
        kwargs = _shared_by_groups({k: v for k, v in kwargs.items() if k != "memory_efficient"})
        refuse_captured(kwargs.get("attn_bias"), x.device)
        if "cache" not in kwargs:
            groups = self._groups(x, kwargs.get("context"))
            if self._against_groups() is None:
                return HeadGroupBranch(self, groups, kwargs, norm)
        return Branch(self, kwargs, norm)

    def _groups(self, x: Tensor, context: Tensor | None) -> tuple[HeadGroup, ...]:
        if self.head_groups is not None:
            return self.head_groups
        number = head_chunks_for(x, context, (self.heads, self.kv_heads), self.dim_head)
        return HeadGroup.split(self.heads, self.kv_heads, number)

    def _against_groups(self) -> str | None:
        """Return a projection that cannot be computed for some heads at a time, and why; None if all can."""
        for name in ("to_q", "to_kv", "to_out"):
            projection = getattr(self, name)
            reason = reason_against(projection, nn.Linear) or ("it has a bias" if projection.bias is not None else None)
            if reason is not None:
                return f"{name}, {reason}"
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        group: HeadGroup | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        **given: Any,
    ) -> Tensor:
        """Attend with projected heads q ``(b, h, n, d)``, k and v ``(b, kv, m, d)``; return ``(b, h, n, d)``.

        group: which heads. given: the other keywords of :meth:`forward` that are not None.
        """
        q, k, scale = self.prepare(q, k, slice(None) if group is None else group.heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(self, k, v, window_sides(self.window)[0])
            for name in ("mask", "document_ids"):
                if name in given:
                    given[name] = _last_keys(name, given[name], cache.length + q.shape[2], k.shape[2])
        if group is not None:
            given |= {
                name: _of_heads(name, given[name], group.heads) for name in ("mask", "attn_bias") if name in given
            }
        given = {"q_bucket_size": self.q_bucket_size, "k_bucket_size": self.k_bucket_size, **given}
        dropout = self.dropout if self.training else 0.0
        # dict(**…) instead of a literal, since a call refuses duplicate keywords.
        own = {"causal": self.causal, "window": self.window, "backend": self.backend, "dropout": dropout}
        options: dict[str, Any] = dict(**own, scale=scale, **given)
        kept = KeptResults.active() if self.keep_attention else None
        if kept is None:
            out: Tensor = dot_product_attention(q, k, v, **options)
            return out
        decision, q, k, v = decide(q, k, v, keep=True, **options)
        how: Any = {"offload": self.keep_attention == "cpu", "option": "keep_attention"}
        # The recomputation must use the forward pass's way, whatever would be decided now.
        way, results = kept.fetch(self, lambda: (decision.way, decision.compute(q, k, v)), **how)
        return Decision(decision.request, way).attend(q, k, v, results)[0]

    def prepare(self, q: Tensor, k: Tensor, heads: slice) -> tuple[Tensor, Tensor, float | None]:
        """Transform projected queries and keys before their product; return them with the scale."""
        return q, k, None

    def check(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rotary: Any = None,
        cache: KVCache | None = None,
        mask: Mask | None = None,
        attn_bias: Tensor | BiasModule | None = None,
        **_: Any,
    ) -> None:
        """Raise ValueError for arguments of :meth:`forward` that do not go together."""
        for argument, tensor in (("x", x), ("context", x if context is None else context)):
            fits = tensor.dim() == 3 and tensor.shape[-1] == self.dim
            require(fits, argument, f"shape (batch, tokens, {self.dim})", tuple(tensor.shape))
        if context is not None:
            require(len(context) == len(x), "context", f"batch {len(x)}, that of x", len(context))
            require(rotary is None and cache is None, "context", "none beside rotary or cache", "both")
        for table in rotary or ():
            shape, rows = (x.shape[1], self.dim_head // 2), (1, len(x))
            fits = tuple(table.shape) in (shape, *((b, *shape) for b in rows), *((b, 1, *shape) for b in rows))
            require(fits, "rotary", f"cosines and sines of shape {shape}, or of each row of x", tuple(table.shape))
        whole = cache is None or active() is None
        require(whole, "cache", "none where tokens are divided over processes", "one")
        # Indices are counted from 0, and a cache drops keys.
        of_indices = callable(mask), is_score_function(attn_bias)
        for name, refused in zip(("mask", "attn_bias"), of_indices, strict=True):
            require(cache is None or not refused, name, "no function of indices together with a cache", "one")


def _shared_by_groups(given: dict[str, Any]) -> dict[str, Any]:
    """Drop keywords that are None and wrap a mask function so that groups of heads share its classification."""
    given = {name: value for name, value in given.items() if value is not None}
    if callable(given.get("mask")):
        given["mask"] = mask_function(given["mask"])
    return given


def _last_keys(argument: str, tensor: Tensor, seen: int, keys: int) -> Tensor:
    """Restrict what covers all tokens ``seen`` to the last ``keys``, those that the cache still has."""
    fits = tensor.shape[-1] in (1, seen, keys)
    require(fits, argument, f"a last dimension of {seen}, the cache's tokens and the new ones", tensor.shape[-1])
    return tensor if tensor.shape[-1] == 1 else tensor[..., -keys:]


def _of_heads(argument: str, tensor: Any, heads: slice) -> Any:
    """Restrict a mask or a bias, a tensor or a function, to some heads."""
    if isinstance(tensor, Tensor):
        per_head = tensor.dim() >= 3 and tensor.shape[-3] > 1
        return tensor[..., heads, :, :] if per_head else tensor
    return mask_function(tensor).of_heads(heads) if argument == "mask" else bias_of_heads(tensor, heads)


class FlashAttention(Attention):
    """:class:`Attention` under another name, with version 0.1's order of positional arguments.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import FlashAttention
        >>> attention = FlashAttention(dim=64, heads=4, dim_head=16)
        >>> x, context = torch.randn(2, 300, 64), torch.randn(2, 50, 64)
        >>> attention(x, context=context).shape
        torch.Size([2, 300, 64])
    """

    as_branch = Attention.as_branch  # defined here too, since a class with its own forward must offer its own pieces

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Mask | None = None,
        q_bucket_size: int | None = None,
        k_bucket_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map x ``(b, n, dim)`` to ``(b, n, dim)``; further keywords as for :meth:`Attention.forward`."""
        buckets: dict[str, Any] = {"q_bucket_size": q_bucket_size, "k_bucket_size": k_bucket_size}
        return super().forward(x, context, mask, **buckets, **kwargs)
