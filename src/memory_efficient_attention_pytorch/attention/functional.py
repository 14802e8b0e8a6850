"""The functional entry: one question, four ways to the same answer, and why one of them was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..common.errors import require
from ..common.recording import Recording
from . import naive
from . import sdpa as fused
from . import sdpa_kept as kept
from . import tiles as tiled
from .request import AttentionRequest, BiasModule, build_request

BACKENDS = ("naive", "tiled", "fused", "auto")
# Scores of a head, below which PyTorch's fused kernel is no slower than tiles by oneDNN.
FUSED_ENOUGH = 2**21


@dataclass(frozen=True)
class BackendChoice:
    """Which backend runs, why, and what was ruled out for which reason."""

    name: str
    reason: str
    ruled_out: dict[str, str] = field(default_factory=dict)


def dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    attn_bias: Tensor | BiasModule | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    document_ids: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
    q_bucket_size: int = 512,
    k_bucket_size: int = 1024,
    return_lse: bool = False,
) -> Any:
    r"""Exact attention, ``softmax(scale · q kᵀ + attn_bias) v`` over what each query may see, in O(n + m) memory.

    Args:
        q, k, v: ``(b, h, n, d)``, ``(b, kv, m, d)``, ``(b, kv, m, e)``; floating point, one dtype and device;
            h a multiple of kv (grouped queries: query head i uses key/value head ``i // (h // kv)``).
        mask: bool, True = may attend; key padding ``(b, m)``, or any shape broadcastable to ``(b, h, n, m)``.
        attn_bias: added to the scaled scores before masking: a tensor broadcastable to ``(b, h, n, m)``, or a module
            called per tile as ``module(query_positions (i,), key_positions (j,))`` that returns a tensor broadcastable
            to ``(b, h, i, j)``. Positions are those of the keys, consecutive; query i stands at ``i + m - n``.
            Gradients reach the tensor or the module's parameters.
        causal: query i sees keys ``j <= i + m - n``: aligned at the end, so a decode step equals the full pass.
        window: ``(left, right)``, how many keys before and after its own position a query sees; w means (w, w).
        document_ids: integers ``(b, m)``; a token sees its own document only. The queries are the last n.
        dropout: probability in [0, 1) of dropping a normalised weight; survivors are scaled by 1/(1 − dropout).
            Applied whenever it is above 0. The seed comes from PyTorch's default CPU generator.
        scale: defaults to ``d ** -0.5``.
        backend: ``"auto"`` picks; ``"naive"`` (O(n·m) memory, the reference), ``"tiled"`` and ``"fused"`` are honoured
            or refused. See :func:`select_backend`.
        q_bucket_size, k_bucket_size: the tiles' sides. They move time and memory, not the result (except which
            weights dropout drops).
        return_lse: also return the log-sum-exp of each row.

    Returns:
        ``(b, h, n, e)`` in v's dtype; with ``return_lse`` a pair with ``(b, h, n)`` in fp32 (fp64 for fp64). A query
        that sees nothing has output 0, gradient 0 and log-sum-exp −∞.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for cannot serve the request.

    Scores, softmax and accumulators are fp32, or fp64 for fp64. Under autocast q, k and v are cast as for PyTorch's own
    attention. Differentiable once (the tiled backend raises on a second derivative). Sources: Rabe & Staats 2021
    (arXiv:2112.05682), Dao et al. 2022 (arXiv:2205.14135).
    """
    q, k, v = _autocast(q, k, v)
    request = build_request(
        q,
        k,
        v,
        mask=mask,
        attn_bias=attn_bias,
        causal=causal,
        window=window,
        document_ids=document_ids,
        dropout=dropout,
        scale=scale,
        q_bucket_size=q_bucket_size,
        k_bucket_size=k_bucket_size,
        return_lse=return_lse,
    )
    choice = _choose(request, backend, q, k, v)
    if choice.name == "fused":
        return fused.attention(request, q, k, v)
    out, lse = (tiled if choice.name == "tiled" else naive).attention(request, q, k, v)
    return (out, lse) if return_lse else out


def recorded_attention(
    recording: Recording, owner: object, offload: bool, q: Tensor, k: Tensor, v: Tensor, *, backend: str, **options: Any
) -> Tensor:
    """:func:`dot_product_attention`, computed in the forward pass alone; its repetition takes what ``recording`` has.

    owner: who calls, the same in both passes. offload: keep it in host memory. options: the other arguments, all of
    them but ``return_lse``. backend: not ``"naive"``.
    """
    q, k, v = _autocast(q, k, v)
    with torch.enable_grad():  # the forward pass asks what backward will: does the bias want a gradient?
        request = build_request(q, k, v, return_lse=False, **options)
    choice = _choose(request, backend, q, k, v)
    by_kernel = choice.name == "fused" and kept.kernel_for(request, q, k, v) is not None
    found = recording.find(owner, lambda: (kept if by_kernel else tiled).find(request, q, k, v), offload)
    return (tiled if found.by == "tiled" else kept).again(request, q, k, v, found)


def select_backend(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **arguments: Any) -> BackendChoice:
    """Which backend :func:`dot_product_attention` runs for these arguments (its own), with the reasons.

    Raises what :func:`dot_product_attention` would raise.
    """
    defaults: dict[str, Any] = {
        "mask": None,
        "attn_bias": None,
        "causal": False,
        "window": None,
        "document_ids": None,
        "dropout": 0.0,
        "scale": None,
        "q_bucket_size": 512,
        "k_bucket_size": 1024,
        "return_lse": False,
    }
    for name in arguments:
        require(name in defaults, name, f"one of {', '.join(defaults)}", "an unknown argument")
    q, k, v = _autocast(q, k, v)
    return _choose(build_request(q, k, v, **{**defaults, **arguments}), backend, q, k, v)


def _choose(request: AttentionRequest, backend: str, q: Tensor, k: Tensor, v: Tensor) -> BackendChoice:
    require(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    if backend in ("naive", "tiled"):
        return BackendChoice(backend, "asked for")
    objection = fused.reason_against(request, q, k, v)
    if backend == "fused":
        if objection is not None:
            raise NotImplementedError(f"backend: 'fused' cannot serve this call: {objection}; use 'tiled' or 'auto'")
        return BackendChoice("fused", "asked for")
    ruled_out = {"naive": "holds all n × m scores"}
    mask = request.visibility.mask
    if objection is None and mask is not None and mask.shape[2] > 1:
        objection = "it would convert the n × m mask to floating point"
    if objection is None and request.onednn and request.n * request.m >= FUSED_ENOUGH:
        objection = "it multiplies with MKL, which leaves this CPU's AVX-512 unused; tiles by oneDNN are faster"
    if objection is None:
        return BackendChoice("fused", "PyTorch's fused kernel computes exactly this", ruled_out)
    return BackendChoice("tiled", "serves every request in linear memory", {**ruled_out, "fused": objection})


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the arguments of PyTorch's attention: fp32 to its dtype, fp64 left alone."""
    if not all(isinstance(t, Tensor) for t in tensors) or tensors[0].device.type == "meta":
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
