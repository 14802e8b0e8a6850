"""Transformers on sequences far longer than memory should allow, with exact gradients.

What backpropagation can compute again or invert is never stored: attention scores, hidden values of the feed-forward,
activations of layers, logits.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autoregressive_wrapper import AutoregressiveWrapper
    from .cache import KVCache
    from .feedforward import FeedForward, PreNorm
    from .flash_attention import FlashAttention
    from .functional.attention import BackendChoice, dot_product_attention, select_backend
    from .functional.linear_cross_entropy import linear_cross_entropy
    from .memory_efficient_attention import Attention, memory_efficient_attention
    from .memory_efficient_cosine_sim_attention import (
        CosineSimAttention,
        numerically_unstable_memory_efficient_attention,
    )
    from .pieces import Chunked
    from .planner.plan import Plan, max_seq_len, plan
    from .positions import AlibiBias, RelativePositionBias, RotaryEmbedding
    from .reversible import ReversibleSequence
    from .transformer import Transformer

__all__ = [
    "AlibiBias",
    "Attention",
    "AutoregressiveWrapper",
    "BackendChoice",
    "Chunked",
    "CosineSimAttention",
    "FeedForward",
    "FlashAttention",
    "KVCache",
    "Plan",
    "PreNorm",
    "RelativePositionBias",
    "ReversibleSequence",
    "RotaryEmbedding",
    "Transformer",
    "dot_product_attention",
    "linear_cross_entropy",
    "max_seq_len",
    "memory_efficient_attention",
    "numerically_unstable_memory_efficient_attention",
    "plan",
    "select_backend",
]

# Where the public names are. Each module is imported, and PyTorch with it, when one of its names is first used: until
# then the command line can answer, and set what PyTorch reads when it is loaded.
_NAMES = {
    "autoregressive_wrapper": ("AutoregressiveWrapper",),
    "cache": ("KVCache",),
    "feedforward": ("FeedForward", "PreNorm"),
    "flash_attention": ("FlashAttention",),
    "functional.attention": ("BackendChoice", "dot_product_attention", "select_backend"),
    "functional.linear_cross_entropy": ("linear_cross_entropy",),
    "memory_efficient_attention": ("Attention", "memory_efficient_attention"),
    "memory_efficient_cosine_sim_attention": ("CosineSimAttention", "numerically_unstable_memory_efficient_attention"),
    "pieces": ("Chunked",),
    "planner": ("Plan", "max_seq_len", "plan"),
    "positions": ("AlibiBias", "RelativePositionBias", "RotaryEmbedding"),
    "reversible": ("ReversibleSequence",),
    "transformer": ("Transformer",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """A public name or a module, looked up for the first time."""
        if name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            setattr(self, name, value)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """A module that has been loaded becomes its package's attribute. This one leaves its name to its function."""
        if name == "memory_efficient_attention" and isinstance(value, ModuleType):
            value = value.memory_efficient_attention
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
