"""The only room that touches PyTorch's private parts.

Each part is a :class:`Capability`: looked up on first use and never at import, None where this PyTorch has none of that
name and signature. Whoever asks has a public way for that case, slower and as exact.
"""

from .capabilities import ALL, Capability, capability, operator, taken_away

__all__ = ["ALL", "Capability", "capability", "operator", "taken_away"]
