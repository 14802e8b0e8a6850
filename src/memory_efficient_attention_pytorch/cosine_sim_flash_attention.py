"""Names of version 0.1; what they are is in the rooms they come from."""

from .attention.version_0_1 import CosineSimFlashAttentionFunction as FlashAttentionFunction
from .layers.cosine_attention import CosineSimFlashAttention as FlashAttention

__all__ = ["FlashAttention", "FlashAttentionFunction"]
