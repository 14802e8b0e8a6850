"""Names of version 0.1; what they are is in the rooms they come from."""

from typing import TYPE_CHECKING

from .common.lazy import names_from

if TYPE_CHECKING:
    from .attention.version_0_1 import attention, memory_efficient_attention
    from .layers.attention import Attention

__all__ = ["Attention", "attention", "memory_efficient_attention"]

# The package loads this module with itself (see there), so nothing here may load PyTorch before it is asked for.
__getattr__, __dir__ = names_from(
    __name__,
    {
        "Attention": "layers.attention",
        "attention": "attention.version_0_1",
        "memory_efficient_attention": "attention.version_0_1",
    },
)
