"""Names of version 0.1; what they are is in the rooms they come from."""

from .models.generation import AutoregressiveWrapper

__all__ = ["AutoregressiveWrapper"]
