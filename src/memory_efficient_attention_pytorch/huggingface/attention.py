"""Attention of transformers' models, through its ``AttentionInterface`` and ``AttentionMaskInterface``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..attention.functional import dot_product_attention
from ..common.divided import refuse_divided, within
from .visibility import NAME, memory_efficient_mask
from .visible import Visible


def memory_efficient_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' interface has it: query ``(b, h, n, d)`` → ``(b, n, h, e)`` and None.

    softcap: scores become ``softcap · tanh(score / softcap)`` (Gemma 2). s_aux: ``(h,)``, or sinks: ``(b, h, n, 1)``,
    a score that takes part in the softmax and has no value (gpt-oss, Inkling 2): with log-sum-exp L the output is
    multiplied by ``sigmoid(L − s_aux)``.

    Raises:
        NotImplementedError: attention weights, a paged cache or chosen keys are asked for, the mask is missing, softcap
            comes with a bias, or the model does not support tokens divided over processes.
    """
    divided = attention_mask.divided if isinstance(attention_mask, Visible) else None
    if divided is None:
        refuse_divided(type(module).__name__)
    if others.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise _refusal(module, "output_attentions: attention weights are never computed as a whole")
    if cache is not None:
        raise _refusal(module, "cache: a paged cache is not supported")
    if any(others.get(name) is not None for name in ("indices", "block_indices")):
        raise _refusal(module, "indices: keys that an indexer chose are not supported")
    arguments = _what_is_seen(module, query, key, attention_mask, is_causal)
    if softcap is not None and (position_bias is not None or "attn_bias" in arguments):
        raise _refusal(module, "softcap: not together with a bias")
    if softcap is not None:
        arguments["attn_bias"] = SoftCap(softcap)
    if position_bias is not None:
        before = arguments.get("attn_bias")
        arguments["attn_bias"] = position_bias if before is None else position_bias + before
    options = {"dropout": float(dropout), "scale": scaling, **arguments}
    if divided is not None and position_bias is not None:
        raise _refusal(module, "position_bias: not supported where tokens are divided over processes")
    # A checkpoint recomputes this in backward, perhaps outside the user's ``with``.
    with nullcontext() if divided is None else within(divided):
        if s_aux is not None:
            sinks = s_aux.view(1, -1, 1, 1)
        if sinks is None:
            out = dot_product_attention(query, key, value, **options)
        else:
            out, lse = dot_product_attention(query, key, value, return_lse=True, **options)
            out = out * torch.sigmoid(lse.unsqueeze(-1) - sinks.to(lse.dtype)).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


class SoftCap:
    """A ``score_mod``: ``softcap · tanh(score / softcap)``."""

    def __init__(self, softcap: float) -> None:
        self.softcap = softcap

    def __call__(self, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / self.softcap) * self.softcap


def _what_is_seen(
    module: nn.Module, query: Tensor, key: Tensor, mask: Visible | Tensor | None, is_causal: bool | None
) -> dict[str, Any]:
    n, m = query.shape[2], key.shape[2]
    if isinstance(mask, Visible) and not mask.left_to_layers:
        if mask.queries == 1 < n and mask.keys == m:
            return {"mask": mask.materialize()}  # the same for every query
        if (mask.queries, mask.keys) != (n, m):
            dropped = " (checkpointed layers are given no cache)" if mask.keys > m == n else ""
            raise _refusal(module, f"its mask is for {mask.queries} × {mask.keys} tokens, not {n} × {m}{dropped}")
        return dict(mask.arguments)
    if mask is not None and not isinstance(mask, Visible):
        return {"mask" if mask.dtype == torch.bool else "attn_bias": mask}
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and n > 1
    if causal and n != m:
        raise _refusal(module, f"it passes no mask for {n} queries and {m} keys")
    return {"causal": causal}


def _refusal(module: nn.Module, why: str) -> NotImplementedError:
    number = getattr(module, "layer_idx", None)
    layer = type(module).__name__ + ("" if number is None else f" of layer {number}")
    return NotImplementedError(f"{layer}: {why}; restore(model) brings back its own attention")


def register() -> None:
    """Register attention and masks with transformers under NAME. Other names stay unchanged."""
    AttentionInterface.register(NAME, memory_efficient_attention)
    AttentionMaskInterface.register(NAME, memory_efficient_mask)
