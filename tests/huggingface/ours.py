"""Our Transformer as a model of transformers, small, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch

from memory_efficient_attention_pytorch.huggingface import MemoryEfficientConfig, MemoryEfficientForCausalLM

SMALL: dict[str, Any] = {"num_tokens": 61, "max_seq_len": 48, "dim": 32, "depth": 2, "heads": 4, "dim_head": 8}
KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary, grouped, tied": {"positions": "rotary", "kv_heads": 2, "tie_embeddings": True},
    "alibi with a window": {"positions": "alibi", "window": (5, 0)},
}


def model_of(kind: str, **options: Any) -> MemoryEfficientForCausalLM:
    torch.manual_seed(0)
    return MemoryEfficientForCausalLM(MemoryEfficientConfig(**{**SMALL, **KINDS[kind], **options})).eval()


def prompts(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask; the first row is padded on the left."""
    ids = torch.randint(3, 61, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask
