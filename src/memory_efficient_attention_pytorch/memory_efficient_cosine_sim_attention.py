"""Names of version 0.1; what they are is in the rooms they come from."""

from .attention.version_0_1 import numerically_unstable_memory_efficient_attention
from .attention.version_0_1 import unscaled_attention as attention
from .layers.cosine_attention import CosineSimAttention

__all__ = ["CosineSimAttention", "attention", "numerically_unstable_memory_efficient_attention"]
