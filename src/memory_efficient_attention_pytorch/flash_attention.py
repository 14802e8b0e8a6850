"""Names of version 0.1; what they are is in the rooms they come from."""

from .attention.version_0_1 import FlashAttentionFunction
from .layers.attention import FlashAttention

__all__ = ["FlashAttention", "FlashAttentionFunction"]
