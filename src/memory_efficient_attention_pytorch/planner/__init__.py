"""What a training step needs, known before it runs: a dry run of the real code under fake tensors."""

from ..common.sizes import available_memory, format_size, parse_size
from .plan import Option, Plan, max_seq_len, plan
from .timeline import CATEGORIES, Operation, Timeline

__all__ = [
    "CATEGORIES",
    "Operation",
    "Option",
    "Plan",
    "Timeline",
    "available_memory",
    "format_size",
    "max_seq_len",
    "parse_size",
    "plan",
]
