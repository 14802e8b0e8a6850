"""The functional interface: exact attention, and the way of computing it that is chosen, with reasons."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from ..common.compiled import eagerly
from ..common.errors import require
from .bias import BiasModule, is_score_function
from .decision import WAYS, decide
from .request import build_request
from .visibility import Mask, Window


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend and way of computing, the reason, and why each other backend was ruled out.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import BackendChoice, select_backend
        >>> q = torch.randn(1, 8, 16, 64)
        >>> select_backend(q, q, q, backend="naive")
        BackendChoice(name='naive', reason='asked for', ruled_out={}, way='naive')
    """

    name: str
    reason: str
    ruled_out: dict[str, str] = field(default_factory=dict)
    way: str = ""


class Options(TypedDict, total=False):
    """Keyword arguments of :func:`dot_product_attention` except ``return_lse``, which changes the result type."""

    mask: Mask | None
    attn_bias: Tensor | BiasModule | None
    causal: bool
    window: Window | None
    document_ids: Tensor | None
    dropout: float
    scale: float | Tensor | None
    backend: str
    q_bucket_size: int
    k_bucket_size: int


@overload
def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...
def dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    attn_bias: Tensor | BiasModule | None = None,
    causal: bool = False,
    window: Window | None = None,
    document_ids: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | Tensor | None = None,
    backend: str = "auto",
    q_bucket_size: int = 512,
    k_bucket_size: int = 1024,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Compute exact attention, ``softmax(scale · q kᵀ + attn_bias) v`` over visible keys, in O(n + m) memory.

    Args:
        q, k, v: ``(b, h, n, d)``, ``(b, kv, m, d)``, ``(b, kv, m, e)``; floating point, one dtype and device;
            h a multiple of kv (grouped queries: query head i uses key/value head ``i // (h // kv)``).
        mask: bool, True = may attend; key padding ``(b, m)``, or any shape broadcastable to ``(b, h, n, m)``. Or a
            function of indices, ``mask(batch, head, query, key) -> bool``, as FlexAttention's ``mask_mod``: called per
            tile with integer tensors that broadcast, queries and keys counted from 0. A :class:`MaskFunction` remembers
            for later calls which tiles are empty or full.
        attn_bias: added to the scaled scores before masking: a tensor broadcastable to ``(b, h, n, m)``, or a module
            called per tile as ``module(query_positions (i,), key_positions (j,))`` that returns a tensor broadcastable
            to ``(b, h, i, j)``. Positions are counted along the keys; query i is at ``i + m - n``. Gradients reach the
            tensor or the module's parameters. Or a function of the score and of indices, ``f(score, batch, head, query,
            key) -> score``, as FlexAttention's ``score_mod``, whose result replaces the scaled score; queries and keys
            are counted from 0. Gradients pass through it, and reach the tensors that it captures. Masks, modules and
            functions are evaluated again in backward: they must not draw random numbers.
        causal: query i sees keys ``j <= i + m - n``: aligned at the end, so a decoding step equals the full pass.
        window: ``(left, right)``, how many keys before and after its own position a query sees; w means (w, w).
        document_ids: integers ``(b, m)``; a token sees only its own document. The queries are the last n tokens.
        dropout: probability in [0, 1) of dropping a normalised weight; survivors are scaled by 1/(1 − dropout).
            Applied whenever it is above 0. The seed comes from PyTorch's default CPU generator.
        scale: defaults to ``d ** -0.5``. A tensor that broadcasts to ``(b, h, n, 1)`` multiplies q in
            q's dtype, and may require a gradient.
        backend: ``"auto"`` chooses; ``"naive"`` (O(n·m) memory, the reference), ``"tiled"``, ``"fused"`` and the name
            of a single way (``select_backend(...).way``) are used or refused.
        q_bucket_size, k_bucket_size: the tiles' sides in tokens. They change time and memory, not the result (except
            which weights dropout drops).
        return_lse: also return the log-sum-exp of each row.

    Returns:
        ``(b, h, n, e)`` in v's dtype; with ``return_lse`` a pair with ``(b, h, n)`` in fp32 (fp64 for fp64). A query
        that sees nothing has output 0, gradient 0 and log-sum-exp −∞.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for cannot compute the request.

    Scores, softmax and accumulators are fp32, or fp64 for fp64. A bias over a whole row may be of any finite size: the
    largest value that a row sees is subtracted first, unless even fp64 would round the scores away beside it (2**56
    and above, such as finfo.min: the scores then count as equal, but for CUDA's kernels). Hidden keys and values, if
    finite, affect neither output nor gradients. On a CPU the magnitudes of q, k and v are checked first, and where
    scores may exceed 2**16 another way of computing is chosen, which rounds differently. Other devices, compiled code
    and tensor subclasses skip the check, and PyTorch's kernels then lose scores above 2**16 in the log-sum-exp and
    return NaN for hidden products beyond fp32's range; ``backend="products"`` does not.

    Under autocast q, k and v are cast as for PyTorch's own attention. Differentiable once (the tiled backend raises on
    a second derivative). Sources: Rabe & Staats 2021 (arXiv:2112.05682), Dao et al. 2022 (arXiv:2205.14135).

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import dot_product_attention
        >>> q, k, v = (torch.randn(2, 8, 1000, 64, requires_grad=True) for _ in range(3))
        >>> padding = torch.arange(1000) < torch.tensor([[1000], [700]])
        >>> out = dot_product_attention(q, k, v, causal=True, window=(256, 0), mask=padding)
        >>> out.sum().backward()
        >>> out.shape
        torch.Size([2, 8, 1000, 64])
    """
    arguments: dict[str, Any] = {
        "mask": mask,
        "attn_bias": attn_bias,
        "causal": causal,
        "window": window,
        "document_ids": document_ids,
        "dropout": dropout,
        "scale": scale,
        "backend": backend,
        "q_bucket_size": q_bucket_size,
        "k_bucket_size": k_bucket_size,
        "return_lse": return_lse,
    }
    if torch.compiler.is_compiling() and backend != "naive":
        return _compiled(q, k, v, arguments)
    return _attend(q, k, v, arguments)


def _attend(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    decision, q, k, v = decide(q, k, v, **arguments)
    out, lse = decision.attend(q, k, v)
    if not arguments["return_lse"]:
        return out
    assert lse is not None  # ways without one object to return_lse
    return out, lse


def _compiled(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """Attend under a compiler: by PyTorch's function, in the graph, where that serves; otherwise eagerly.

    Tiles depend on lengths and on what tensors hold, so each length would have a graph of its own.
    """
    # A decision with dropout draws a seed, and there must be one draw.
    in_graph = arguments["backend"] in ("auto", "fused", "sdpa") and not is_score_function(arguments["attn_bias"])
    if in_graph and not arguments["dropout"]:
        try:
            decision, q, k, v = decide(q, k, v, **{**arguments, "backend": "sdpa"})
        except NotImplementedError:
            pass  # another way may serve; if none does, the eager call says so
        else:
            return decision.attend(q, k, v)[0]
    return eagerly(_attend, q, k, v, arguments)


def select_backend(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **arguments: Any) -> BackendChoice:
    """Return which backend :func:`dot_product_attention` runs for these arguments, with the reasons.

    Raises what :func:`dot_product_attention` would raise.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import select_backend
        >>> q = torch.randn(1, 8, 4096, 64)
        >>> choice = select_backend(q, q, q, causal=True, dropout=0.1)
        >>> choice.name, choice.ruled_out["naive"]
        ('tiled', 'holds all n × m scores')
    """
    known = tuple(inspect.signature(build_request).parameters)[3:]
    for name in arguments:
        require(name in known, name, f"one of {', '.join(known)}", "an unknown argument")
    with torch.random.fork_rng(devices=[]):  # a decision with dropout draws a seed, on the CPU
        decision, *heads = decide(q, k, v, backend=backend, **arguments)
    request, chosen = decision.request, decision.way
    if backend != "auto":
        return BackendChoice(chosen.backend, "asked for", way=chosen.name)
    ruled_out = {
        way.backend: way.objection(request, *heads) or way.drawback(request) or chosen.merit
        for way in reversed(WAYS)
        if way.backend != chosen.backend
    }
    return BackendChoice(chosen.backend, chosen.merit, ruled_out, chosen.name)
