"""Predict what a training step needs before it runs, by a dry run of the real code on fake tensors."""

from ..common.sizes import available_memory, format_size, parse_size
from .plan import max_seq_len, plan
from .result import Option, Plan
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
