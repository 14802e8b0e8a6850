"""Measure the memory of a training step in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.errors import require
from ..training.resources import trim_heap, warm_up

_CHILD = f"from {__name__} import _run_child; _run_child()"
_RESULT = "measured-peak:"
_ONEDNN = "could not create a primitive"
"""oneDNN's message for any failure to compile a kernel; under a memory limit it means lack of memory."""
_OUT_OF_MEMORY = ("OutOfMemoryError", "can't allocate memory", "MemoryError", "std::bad_alloc", _ONEDNN)


@dataclass(frozen=True)
class Measurement:
    """Bytes and seconds of one call of a step.

    ``peak_bytes`` is the high-water mark above ``held_bytes``: what the step needed beyond what existed before it.
    ``held_bytes`` is what building (model, gradients, inputs) added to a process with PyTorch loaded and warmed up.
    ``reserved_bytes`` is address space that the step reserved and never touched: not memory, but a limit counts it.
    """

    peak_bytes: int
    held_bytes: int
    seconds: float
    reserved_bytes: int = 0


def measure_peak(
    target: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    limit_bytes: int | None = None,
    timeout: float | None = None,
) -> Measurement:
    """Measure a step in a fresh process: the resident set's high-water mark, or CUDA's ``max_memory_allocated``.

    On the CPU the allocator's mmap threshold is fixed at 64 KiB: by default glibc raises it as blocks are freed and
    keeps memory that it should return, so that the same step may seem to take up to three times as much.

    Args:
        target: ``"package.module:function"`` or ``"path/to/file.py:function"``. The function is called with
            ``arguments``, builds what exists before the step (``zero_grads`` allocates a model's gradients) and returns
            a callable without arguments: the step to measure. Its return value is kept until the peak has been read.
        arguments: JSON-serialisable keywords of the function.
        device: ``"cpu"`` (Linux only, since it reads ``/proc``) or a CUDA device.
        threads: CPU threads of the step; PyTorch's own default if not given.
        limit_bytes: limit the step on a CPU to this many bytes above what was built; an allocation beyond that fails.
            The system limits address space, ``reserved_bytes`` included.
        timeout: seconds after which the process is killed.

    Raises:
        MemoryError: the step did not fit in the device or in ``limit_bytes``.
        ValueError: ``limit_bytes`` for another device.
        RuntimeError: the function or the step failed in another way; contains the process's stderr.
        subprocess.TimeoutExpired: ``timeout`` has passed.
    """
    require(limit_bytes is None or torch.device(device).type == "cpu", "limit_bytes", "None but on a CPU", limit_bytes)
    request = {
        "target": target,
        "arguments": dict(arguments or {}),
        "device": device,
        "threads": threads,
        "limit_bytes": limit_bytes,
    }
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    readings = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode == 0 and readings:
        return Measurement(**json.loads(readings[-1].removeprefix(_RESULT)))
    if any(sign in done.stderr for sign in _OUT_OF_MEMORY if limit_bytes is not None or sign != _ONEDNN):
        raise MemoryError(f"{target} ran out of memory:\n{done.stderr[-2000:]}")
    raise RuntimeError(f"measuring {target} failed with exit status {done.returncode}:\n{done.stderr[-4000:]}")


def zero_grads(model: nn.Module) -> nn.Module:
    """Give every trainable parameter a gradient of zeros that occupies its memory, and return the model."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            # torch.zeros returns untouched pages, which are not resident until written to.
            parameter.grad = torch.empty_like(parameter).fill_(0)
    return model


def _run_child() -> None:
    request = json.load(sys.stdin)
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    build = _load(request["target"])  # before the gauge, since imports are not part of the model
    warm_up(request["device"])
    device = torch.device(request["device"])
    gauge: _CudaGauge | _ResidentSet = _CudaGauge(device) if device.type == "cuda" else _ResidentSet()
    step = build(**request["arguments"])
    held = gauge.start()
    if request["limit_bytes"] is not None and isinstance(gauge, _ResidentSet):
        gauge.limit(request["limit_bytes"])
    began = time.perf_counter()
    kept = step()
    peak, seconds = gauge.peak(), time.perf_counter() - began
    del kept
    measurement = Measurement(max(0, peak - held), held, seconds, gauge.reserved(peak - held))
    sys.stdout.write(f"\n{_RESULT}{json.dumps(asdict(measurement))}\n")


def _load(target: str) -> Callable[..., Callable[[], Any]]:
    module, _, function = target.rpartition(":")
    if not module or not function:
        raise ValueError(f"target must be 'module:function' or 'file.py:function', got {target!r}")
    imported = _from_file(module) if module.endswith(".py") else importlib.import_module(module)
    found: Callable[..., Callable[[], Any]] = getattr(imported, function)
    return found


def _from_file(module: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    if spec is None or spec.loader is None:
        raise ValueError(f"target names a file that cannot be imported: {module!r}")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


class _CudaGauge:
    """Reads the bytes allocated by CUDA's caching allocator, above those when the gauge was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = torch.cuda.memory_allocated(device)

    def start(self) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device) - self.base

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.base

    def reserved(self, taken: int) -> int:
        return 0


class _ResidentSet:
    """Reads this process's resident set and its high-water mark, above the size when the gauge was made."""

    def __init__(self) -> None:
        self.base = _process_bytes("VmRSS")

    def limit(self, limit_bytes: int) -> None:
        # VmData is private writable address space: all that was allocated, touched or not.
        allowed = _process_bytes("VmData") + limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))

    def start(self) -> int:
        held = _process_bytes("VmRSS") - self.base
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.addresses = _process_bytes("VmSize") - _unlimited_bytes()
        return held

    def peak(self) -> int:
        return _process_bytes("VmHWM") - self.base

    def reserved(self, taken: int) -> int:
        return max(0, _process_bytes("VmPeak") - _unlimited_bytes() - self.addresses - taken)


def _process_bytes(field: str) -> int:
    """Read a size from this process's status, after returning the C library's unused heap to the system."""
    trim_heap()
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("CPU memory is measured from /proc, which only Linux has")
    sizes = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(sizes[field].split()[0]) * 1024


def _unlimited_bytes() -> int:
    """Return the address space that a limit on data does not count: shared or read-only, such as libraries' code."""
    total = 0
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        addresses, permissions = line.split(maxsplit=2)[:2]
        if "w" not in permissions or "s" in permissions:
            start, end = (int(address, 16) for address in addresses.split("-"))
            total += end - start
    return total
