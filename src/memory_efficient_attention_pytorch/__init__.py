"""Transformers on sequences far longer than memory should allow, with exact gradients.

What backpropagation can compute again or invert is never stored: attention scores, hidden values of the feed-forward,
activations of layers, logits.
"""

from .autoregressive_wrapper import AutoregressiveWrapper
from .cache import KVCache
from .feedforward import FeedForward, PreNorm
from .flash_attention import FlashAttention
from .functional.attention import BackendChoice, dot_product_attention, select_backend
from .functional.linear_cross_entropy import linear_cross_entropy
from .memory_efficient_attention import Attention, memory_efficient_attention
from .memory_efficient_cosine_sim_attention import CosineSimAttention, numerically_unstable_memory_efficient_attention
from .pieces import Chunked
from .planner import Plan, max_seq_len, plan
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
