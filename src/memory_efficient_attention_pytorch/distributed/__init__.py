"""Tokens over processes."""

from .context_parallel import ContextParallel

__all__ = ["ContextParallel"]
