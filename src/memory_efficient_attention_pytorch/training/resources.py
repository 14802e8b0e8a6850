"""Fit a run to its machine: settings that depend on it, the C library's allocator, and the memory in use."""

import contextlib
import ctypes
import dataclasses
import mmap
import os
import sys

import numpy as np
import torch
from torch import nn

from ..models.transformer import pieces_chosen
from .config import TrainConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1  # a C int


def pick_precision(config: TrainConfig, device: torch.device) -> str:
    """Resolve `config.precision` "auto", for accelerate. Raises ValueError for fp16 on a CPU."""
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs an accelerator: use bf16 or fp32 on a CPU")
    if config.precision != "auto":
        return config.precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched in ("fp16", "bf16"):
        return launched
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return the configuration with every open choice made that depends on the machine.

    Reversal is exact wherever branches compute in less than fp32, since rounding would grow from block to block. There
    are as many pieces as the layers choose by default. Attention is not kept for backward, which would take memory in
    every block.
    """
    precision = pick_precision(config, device)
    reversible = config.reversible is not False
    itemsize = 4 if precision == "fp32" else 2
    shape = {**dataclasses.asdict(config), "reversible": reversible}
    context = config.context_parallel or 1
    threads, divided = torch.get_num_threads(), context > 1
    pieces = pieces_chosen(shape, config.batch_size, config.seq_len, itemsize, device.type, threads, divided)
    return config.updated(
        {
            "precision": precision,
            "reversible": reversible,
            "exact": reversible and precision != "fp32" if config.exact is None else config.exact,
            "keep_attention": config.keep_attention or False,
            "ff_chunks": config.ff_chunks or pieces["ff_chunks"],
            "head_chunks": config.head_chunks or pieces["head_chunks"],
            "shard": config.shard or False,
            "context_parallel": context,
        }
    )


def forget_pages(array: np.ndarray) -> None:
    """Release pages read from a memory-mapped file: they stay in the system's cache, no longer resident."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def return_freed_blocks(at_least: int = 4 << 20) -> None:
    """Have glibc return freed blocks of at least `at_least` bytes to the system, and hold few smaller ones.

    By default glibc raises that size to the largest block freed so far, up to 32 MiB, and holds twice as much at the
    end of its heap. Settings in environment variables take precedence. The default of 4 MiB costs no speed. With 64 KiB
    next to nothing is held, but a step of many small pieces takes up to a quarter longer, since the system clears every
    page again.
    """
    if not _allocator_is_set():
        set_returned_size(at_least)


def set_returned_size(at_least: int = 4 << 20) -> bool:
    """Do the same whatever the environment says. Return False where the C library has no such setting."""
    return _c("mallopt", _M_MMAP_THRESHOLD, at_least) and _c("mallopt", _M_TRIM_THRESHOLD, 2 * at_least)


def keep_freed_blocks() -> None:
    """Have glibc keep freed blocks below 32 MiB, up to 2 GiB, for the next step, which takes the same memory again.

    By default it returns them after every step, and the system clears their pages in the next. The first GiB of the
    heap is also offered to Linux for huge pages, of which a step touches far fewer. Settings in environment variables
    take precedence.
    """
    if _allocator_is_set() or not _c("mallopt", _M_TRIM_THRESHOLD, _LARGEST):
        return
    if _c("mallopt", _M_MMAP_THRESHOLD, _LARGEST):
        # From the heap's end, where it stays. NumPy advises huge pages for large arrays; no page is touched.
        with contextlib.suppress(MemoryError):
            np.empty(1 << 30, np.uint8)
    _c("mallopt", _M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc chooses by itself


def _allocator_is_set() -> bool:
    return bool({"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys())


def trim_heap() -> None:
    """Have the C library return its heap's free memory to the system, where it can."""
    _c("malloc_trim", 0)


def _c(function: str, *arguments: int) -> bool:
    """Call a function of the C library; return whether it exists and succeeded."""
    found = getattr(ctypes.CDLL(None), function, None)
    return found is not None and bool(found(*arguments))


def memory_now(device: torch.device) -> int:
    """Return the bytes in use: allocated on a CUDA device, else resident in RAM for this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    resident: int = psutil.Process().memory_info().rss
    return resident


def memory_peak(device: torch.device) -> int:
    """Return the most bytes in use so far, of the kind that `memory_now` counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    # The kernel updates the peak later than the current size.
    return max(memory_now(device), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def warm_up(device: str) -> None:
    """Run a tiny step, so that modules, threads and handles loaded on first use do not count as the model's."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, 4, 64, 64, device=device, dtype=dtype, requires_grad=True)
        weight = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        hidden = nn.functional.layer_norm(nn.functional.gelu(x @ weight), (64,))
        attended = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
        nn.functional.cross_entropy(attended.flatten(0, 2).float(), torch.zeros(256, device=device).long()).backward()
        torch.optim.AdamW([weight]).step()
