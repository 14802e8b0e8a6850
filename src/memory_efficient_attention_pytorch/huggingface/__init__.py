"""transformers' models made long, by one call that can be undone, and ours as one of them. Needs the extra
``huggingface``. Imported, it makes the Auto classes know :class:`MemoryEfficientForCausalLM`."""

from ..common.errors import brought_by

with brought_by("huggingface"):
    from .change import Report, make_memory_efficient
    from .model import MemoryEfficientConfig, MemoryEfficientForCausalLM
    from .undoing import restore

__all__ = ["MemoryEfficientConfig", "MemoryEfficientForCausalLM", "Report", "make_memory_efficient", "restore"]
