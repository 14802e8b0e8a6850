"""Build the model that a configuration describes."""

from typing import Any

from ..models.config import KNOBS, TransformerConfig
from ..models.transformer import Transformer
from .config import TrainConfig


def build_model(config: TrainConfig, num_tokens: int) -> Transformer:
    """Build a causal Transformer with a vocabulary of `num_tokens`, initialised from torch's global random generator.

    Raises ValueError for a shape that the Transformer refuses.
    """
    return Transformer(**model_keywords(config, num_tokens))


def model_keywords(config: TrainConfig, num_tokens: int) -> dict[str, Any]:
    """Return the Transformer's keywords; what the configuration leaves open takes the Transformer's own default."""
    given = {name: getattr(config, name) for name in KNOBS if hasattr(config, name)}
    chosen = {name: getattr(TransformerConfig, name) if value is None else value for name, value in given.items()}
    window = None if config.window is None else (config.window, 0)
    return chosen | {"num_tokens": num_tokens, "max_seq_len": config.seq_len, "causal": True, "window": window}
