"""Print this machine, its packages and how attention is computed on it, for a bug report.

  mea env

It contains no names of users, hosts or folders.
"""

import argparse
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from ..common.version import __version__

if TYPE_CHECKING:
    import torch

_PACKAGES = ("numpy", "safetensors", "accelerate", "tokenizers", "transformers", "peft")
_SHAPE = (1, 8, 2048, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mea env"


def run(args: argparse.Namespace) -> int:
    import torch

    print(f"memory-efficient-attention-pytorch {__version__}")
    # PyTorch's version says for what it was built.
    lines = [("python", platform.python_version()), ("torch", torch.__version__)]
    lines += [(package, _version(package)) for package in _PACKAGES]
    lines += _machine()
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        print(f"{name:<{width}}{value}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from ..benchmarking.results import describe_machine
    from ..planner import format_size

    machine = describe_machine("cpu")
    yield "system", machine["system"]
    yield "processor", machine["processor"]
    yield "vectors", f"{torch.backends.cpu.get_cpu_capability()}, as PyTorch uses them"
    yield "cores", str(machine["cores"])
    yield "threads", str(torch.get_num_threads())
    yield "memory", format_size(machine["memory_bytes"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    names = ["cpu"]
    if accelerator is not None and accelerator.type == "cuda":
        names += [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    elif accelerator is not None:
        names += [accelerator.type] * torch.accelerator.device_count()
    yield "devices", ", ".join(names)
    for device in ["cpu"] if accelerator is None else ["cpu", accelerator.type]:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield f"attention, {device}, {name}", _attention(device, dtype)


def _attention(device: str, dtype: "torch.dtype") -> str:
    """Return how attention is computed in training: causal, 8 heads of width 64, 2048 tokens."""
    import torch

    from ..attention.functional import select_backend

    q, k, v = (torch.zeros(_SHAPE, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    choice = select_backend(q, k, v, causal=True)
    return f"{choice.name} ({choice.way}): {choice.reason}"
