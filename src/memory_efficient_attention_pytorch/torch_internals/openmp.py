"""The OpenMP whose threads share PyTorch's operators on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .capabilities import capability


@capability
def set_own_threads() -> Callable[[int], Any] | None:
    """``set_own_threads(number)``: by how many threads the calling thread's operators are shared, and no other's.

    ``torch.set_num_threads`` also sets the number with which other threads begin. None unless GNU's OpenMP alone is
    loaded.
    """
    loaded = b""
    with suppress(OSError), open("/proc/self/maps", "rb") as file:  # names of mapped files, of any encoding
        loaded = file.read()
    if [name for name in (b"libgomp", b"libiomp", b"libomp") if name in loaded] != [b"libgomp"]:
        return None
    found: Callable[[int], Any] = ctypes.CDLL(None).omp_set_num_threads
    return found
