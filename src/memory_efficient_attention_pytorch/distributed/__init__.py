"""Context parallelism: one sequence over several processes."""

from .context_parallel import ContextParallel

__all__ = ["ContextParallel"]
