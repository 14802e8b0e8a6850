"""The model that a configuration describes."""

from typing import Any

from ..models.transformer import Transformer
from .config import TrainConfig


def build_model(config: TrainConfig, num_tokens: int) -> Transformer:
    """A causal Transformer over `num_tokens` tokens, initialised from torch's global random generator.

    Raises ValueError for a shape that the Transformer refuses.
    """
    return Transformer(**model_keywords(config, num_tokens))


def model_keywords(config: TrainConfig, num_tokens: int) -> dict[str, Any]:
    """The Transformer's keywords; what the configuration leaves open is the Transformer's own default."""
    return {
        "num_tokens": num_tokens,
        "max_seq_len": config.seq_len,
        "dim": config.dim,
        "depth": config.depth,
        "causal": True,
        "dim_head": config.dim_head,
        "heads": config.heads,
        "ff_mult": config.ff_mult,
        "ff_chunks": config.ff_chunks or 1,
        "kv_heads": config.kv_heads,
        "window": None if config.window is None else (config.window, 0),
        "positions": config.positions,
        "dropout": config.dropout,
        "head_chunks": config.head_chunks or 1,
        "keep_attention": config.keep_attention or False,
        "reversible": config.reversible is not False,
        "exact": bool(config.exact),
        "tie_embeddings": config.tie_embeddings,
        "loss_chunk_size": config.loss_chunk_size,
    }
