"""Names of version 0.1; what they are is in the rooms they come from."""

from .layers.feedforward import FeedForward, PreNorm
from .models.transformer import Transformer

__all__ = ["FeedForward", "PreNorm", "Transformer"]
