"""transformers' models made long, by one call that can be undone. Needs the extra ``huggingface``."""

from .change import Report, make_memory_efficient, restore

__all__ = ["Report", "make_memory_efficient", "restore"]
