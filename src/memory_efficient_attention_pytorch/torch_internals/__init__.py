"""The only room that touches PyTorch's private parts.

Each part is a :class:`Capability`: looked up on first use, never at import, and None if this PyTorch lacks that name or
signature. Every caller then takes a public way, slower and as exact.
"""

from .capabilities import ALL, Capability, capability, operator, taken_away

__all__ = ["ALL", "Capability", "capability", "operator", "taken_away"]
