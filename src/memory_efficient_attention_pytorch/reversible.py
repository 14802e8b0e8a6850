"""Names of version 0.1; what they are is in the rooms they come from."""

from .layers.reversible import ReversibleBlock, ReversibleSequence

__all__ = ["ReversibleBlock", "ReversibleSequence"]
