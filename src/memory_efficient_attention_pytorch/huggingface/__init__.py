"""Long sequences for transformers' models by one reversible call, and our Transformer as a transformers model.

Needs the extra ``huggingface``. Importing it registers :class:`MemoryEfficientForCausalLM` with the Auto classes."""

from ..common.errors import brought_by

with brought_by("huggingface"):
    from .change import Report, make_memory_efficient
    from .model import MemoryEfficientConfig, MemoryEfficientForCausalLM
    from .undoing import restore

__all__ = ["MemoryEfficientConfig", "MemoryEfficientForCausalLM", "Report", "make_memory_efficient", "restore"]
