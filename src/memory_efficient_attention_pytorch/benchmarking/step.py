"""The code that runs in each fresh process: build a system, then time repeated training steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.resources import set_returned_size
from .measure import zero_grads
from .shape import Shape
from .systems import System, find_systems

WARM_UP_TOKENS = 1024


def build(system: str, **how: Any) -> Callable[[], None]:
    """Call ``prepare`` for the system of that name, ours or PyTorch's own; a target of ``measure_peak``."""
    return prepare(find_systems([system])[0], **how)


def prepare(
    system: System,
    shape: Mapping[str, int],
    device: str,
    repeats: int,
    patience: float,
    report: str,
    keep_freed: bool = False,
) -> Callable[[], None]:
    """Build the system with its gradients and return its measured part.

    The measured part runs a forward and backward pass, then repeats it ``repeats`` times or until ``patience`` seconds
    have passed; gradients accumulate in place. It writes to the file ``report``, as JSON: ``first_seconds`` (first use
    of kernels and workspaces included), ``seconds`` of the repetitions, ``loss`` of the first step, and ``parameters``,
    their number. ``keep_freed`` lets glibc keep freed blocks below 4 MiB, as `mea train` does: faster, with a little
    more memory.

    Raises RuntimeError if ``keep_freed`` is set and the C library has no such setting.
    """
    if keep_freed and not set_returned_size():
        raise RuntimeError("keep_freed needs glibc: this C library has no such setting")
    built = Shape(**shape)
    torch.manual_seed(0)
    model, loss = system.build(built)
    model.to(device)
    tokens = torch.randint(built.num_tokens, (built.batch_size, built.seq_len), device=device)
    labels = tokens.roll(-1, dims=1)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    def train_step(length: int = built.seq_len) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=system.autocast):
            value = loss(tokens[:, :length], labels[:, :length])
        torch.autograd.backward(value)
        return value.detach()

    # Modules, kernels and workspaces loaded on first use stay for good (80 MB of modules for checkpointing, about 10 MB
    # of kernels for bf16) and do not grow with the sequence, so they do not count as the step's memory.
    train_step(min(WARM_UP_TOKENS, built.seq_len))
    zero_grads(model)

    def measured() -> None:
        first_seconds, value = timed(train_step, tokens.device)
        seconds: list[float] = []
        while len(seconds) < repeats and first_seconds + sum(seconds) < patience:
            seconds.append(timed(train_step, tokens.device)[0])
        readings = {
            "first_seconds": first_seconds,
            "seconds": seconds,
            "loss": value.item(),
            "parameters": parameters,
        }
        Path(report).write_text(json.dumps(readings))

    return measured


def timed(step: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Run a step; return the seconds until its device is done, and its result."""
    began = time.perf_counter()
    value = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, value
