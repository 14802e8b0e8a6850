"""Transformers on sequences far longer than memory should allow, with exact gradients.

What backpropagation can compute again or invert is never stored: attention scores, hidden values of the feed-forward,
activations of layers, logits.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .common.lazy import names_from
from .common.version import __version__ as __version__

# Loaded now and let go of: importing it later would put the module in the place of the function of the same name.
import_module(".memory_efficient_attention", __name__)
del globals()["memory_efficient_attention"]

if TYPE_CHECKING:
    from .attention.functional import BackendChoice, dot_product_attention, select_backend
    from .attention.mask_function import MaskFunction
    from .attention.version_0_1 import memory_efficient_attention, numerically_unstable_memory_efficient_attention
    from .layers.attention import Attention, FlashAttention
    from .layers.cache import KVCache
    from .layers.chunked import Chunked
    from .layers.cosine_attention import CosineSimAttention
    from .layers.feedforward import FeedForward, PreNorm
    from .layers.positions import AlibiBias, RelativePositionBias, RotaryEmbedding
    from .layers.reversible import ReversibleSequence
    from .loss.linear_cross_entropy import linear_cross_entropy
    from .models.generation import AutoregressiveWrapper
    from .models.transformer import Transformer
    from .planner.plan import max_seq_len, plan
    from .planner.result import Plan

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
    "MaskFunction",
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

# Where the public names are. PyTorch is loaded when one of them is first used: until then the command line can answer.
_NAMES = {
    "attention.functional": ("BackendChoice", "dot_product_attention", "select_backend"),
    "attention.mask_function": ("MaskFunction",),
    "attention.version_0_1": ("memory_efficient_attention", "numerically_unstable_memory_efficient_attention"),
    "layers.attention": ("Attention", "FlashAttention"),
    "layers.cache": ("KVCache",),
    "layers.chunked": ("Chunked",),
    "layers.cosine_attention": ("CosineSimAttention",),
    "layers.feedforward": ("FeedForward", "PreNorm"),
    "layers.positions": ("AlibiBias", "RelativePositionBias", "RotaryEmbedding"),
    "layers.reversible": ("ReversibleSequence",),
    "loss.linear_cross_entropy": ("linear_cross_entropy",),
    "models.generation": ("AutoregressiveWrapper",),
    "models.transformer": ("Transformer",),
    "planner.plan": ("max_seq_len", "plan"),
    "planner.result": ("Plan",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__getattr__, __dir__ = names_from(__name__, _HOMES)
