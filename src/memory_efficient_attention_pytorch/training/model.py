"""The model that a configuration describes."""

from ..transformer import Transformer
from .config import TrainConfig


def build_model(config: TrainConfig, num_tokens: int) -> Transformer:
    """A causal Transformer over `num_tokens` tokens, initialised from torch's global random generator.

    Raises ValueError for a shape that the Transformer refuses.
    """
    return Transformer(
        num_tokens=num_tokens,
        max_seq_len=config.seq_len,
        dim=config.dim,
        depth=config.depth,
        causal=True,
        dim_head=config.dim_head,
        heads=config.heads,
        ff_mult=config.ff_mult,
        ff_chunks=config.ff_chunks or 1,
        kv_heads=config.kv_heads,
        window=None if config.window is None else (config.window, 0),
        positions=config.positions,
        dropout=config.dropout,
        head_chunks=config.head_chunks or 1,
        reversible=config.reversible,
        exact=bool(config.exact),
        tie_embeddings=config.tie_embeddings,
    )
