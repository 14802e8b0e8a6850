"""Parse and format sizes of memory, and find out how much is free."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from .errors import require

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)


def parse_size(size: int | float | str, argument: str = "budget") -> int:
    """Return the bytes of ``"8GB"`` (10⁹ each), ``"8GiB"`` (2³⁰ each), ``"8000M"``, ``"1.5 t"`` or a number of bytes.

    Raises ValueError, naming ``argument``, for anything else and for sizes below one byte.

    Examples:
        >>> from memory_efficient_attention_pytorch.planner import parse_size
        >>> parse_size("8GiB"), parse_size("8 GB")
        (8589934592, 8000000000)
    """
    expected = "a size above zero such as 8GB, 8GiB or 8000M"
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    require(not isinstance(size, str | bool) or match is not None, argument, expected, repr(size))
    amount = float(match[1]) * _UNITS[match[2].lower()] if match else size
    require(isinstance(amount, int | float) and 1 <= amount < float("inf"), argument, expected, repr(size))
    return int(amount)


def format_size(nbytes: float) -> str:
    """Format bytes with three digits and a binary unit.

    Examples:
        >>> from memory_efficient_attention_pytorch.planner import format_size
        >>> format_size(1610612736)
        '1.5 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" or abs(nbytes) >= 100 else f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.4g} TiB"


def available_memory(device: torch.device | str = "cpu") -> int:
    """Return the bytes that could be allocated now: a CUDA device's free memory, or RAM within this process's limits.

    Raises NotImplementedError where the system does not report it.

    Examples:
        >>> from memory_efficient_attention_pytorch.planner import available_memory
        >>> available_memory("cpu") > 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        raise NotImplementedError(f"the free memory of device {str(device)!r} is not known here: give a budget")
    return min(_free_ram(), *_control_group_rooms())


def _free_ram() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(sizes["MemAvailable"].split()[0]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError) as error:
        raise NotImplementedError("this system does not report how much memory is free: give a budget") from error


def _control_group_rooms() -> list[int]:
    """Return the bytes left by this process's control groups, from its own up to the root (versions 2 and 1)."""
    rooms = [2**63]
    memberships = Path("/proc/self/cgroup")
    for line in memberships.read_text().splitlines() if memberships.exists() else ():
        _, controllers, path = line.split(":", 2)
        version_two = not controllers
        if not version_two and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") if version_two else Path("/sys/fs/cgroup/memory")
        *names, cached = _VERSION_TWO if version_two else _VERSION_ONE
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                # Cached files count as used, but make room for what is allocated.
                rooms.append(max(0, limit - max(0, used - _statistic(folder / "memory.stat", cached))))
    return rooms


_VERSION_TWO = ("memory.max", "memory.current", "inactive_file")
_VERSION_ONE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(file: Path, name: str) -> int:
    """Return a number of a file of lines "name number", 0 if it is not there."""
    try:
        found = dict(line.split(" ", 1) for line in file.read_text().splitlines() if " " in line)
    except OSError:
        return 0
    return int(found[name]) if found.get(name, "").isdigit() else 0
