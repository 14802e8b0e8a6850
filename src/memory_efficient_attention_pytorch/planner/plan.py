"""``plan`` and ``max_seq_len``: predict what a training step needs before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import require
from ..common.sizes import parse_size
from .accounting import accounting_for
from .fitting import longest, plan_step
from .result import Plan
from .step import OptimizerMaker
from .workload import Config, ExampleInputs, Workload

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def plan(
    model_or_config: Config | nn.Module,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    dtype: torch.dtype | str | None = None,
    autocast: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    optimizer: str | OptimizerMaker | None = "adamw",
    budget: int | float | str | None = None,
    example_inputs: ExampleInputs = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    training: bool = True,
    threads: int | None = None,
    keep_gradients: bool = True,
    shards: int = 1,
    context: int = 1,
) -> Plan:
    """Plan a training step (forward, backward, optimizer) without running it, by running its code on fake tensors.

    Args:
        model_or_config: keywords of :class:`Transformer`, a built one, or any module with ``example_inputs``.
        batch_size, seq_len: shape of the tokens that a Transformer is trained on.
        dtype: of parameters, gradients and floating-point buffers: ``"fp64"``, ``"fp32"``, ``"bf16"``, ``"fp16"`` or a
            ``torch.dtype``; the model's own if None.
        autocast: the dtype of mixed precision, given as ``dtype`` is; off if None.
        device: ``"cpu"`` or ``"cuda"``, which need not exist here. Default: the device of a built model, else CUDA if
            available.
        optimizer: ``"adamw"``, ``"adam"``, ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, a function from a list of
            parameters to an optimizer, or None for forward and backward alone.
        budget: a size (``"8GiB"``, ``"8000M"``, bytes). For a configuration the fastest settings that fit are chosen
            among those that it leaves open: ``reversible``, ``keep_attention``, ``ff_chunks``, ``head_chunks``,
            ``loss_chunk_size`` and, under autocast, ``exact``.
        example_inputs: arguments of the module's forward: a tensor, a tuple, a mapping of keywords, or a function of
            ``(batch_size, seq_len)`` that makes one. Values do not matter, so ``meta`` tensors are enough.
        loss_fn: turns the module's output into a scalar; default: the output itself, or its attribute ``loss``.
        training: False plans a forward pass without gradients in eval mode; for a Transformer, generation: the prompt
            of ``seq_len`` tokens, which fills the cache of keys and values, and the next token.
        threads: of the CPU's kernels; each thread has buffers, and attention's tiles depend on their number.
            Default: PyTorch's number.
        keep_gradients: whether gradients exist when the step begins, as in gradient accumulation; False: backward
            allocates them, as after ``optimizer.zero_grad()``.
        shards: processes over which FSDP2 shards parameters, gradients and optimizer state, gathered block by block.
        context: processes over which ``distributed.ContextParallel`` divides the tokens of each sequence. Bytes are
            those of the first process, batch and length those of the whole sequence.

    The planned step is any but the first: the optimizer's state exists when it begins.

    Raises:
        ValueError: an argument is invalid or missing.
        NotImplementedError: the module's shapes or control flow depend on the data; the message names the operation.

    Examples:
        >>> from memory_efficient_attention_pytorch import Transformer, plan
        >>> config = dict(num_tokens=256, max_seq_len=4096, dim=64, depth=2, causal=True)
        >>> made = plan(config, batch_size=1, seq_len=4096, device="cuda", budget="1GiB")
        >>> made.fits()
        True
        >>> model = Transformer(**{**config, **made.settings})
    """
    types = _dtype(dtype, "dtype"), _dtype(autocast, "autocast")
    rest = optimizer, *types, example_inputs, loss_fn, training, keep_gradients, shards, context
    workload = Workload(model_or_config, batch_size, seq_len, *rest)
    accounting = accounting_for(chosen_device(device, model_or_config), threads)
    return plan_step(workload, accounting, None if budget is None else parse_size(budget))


def max_seq_len(
    model_or_config: Config | nn.Module,
    *,
    budget: int | float | str,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    autocast: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    optimizer: str | OptimizerMaker | None = "adamw",
    example_inputs: ExampleInputs = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    training: bool = True,
    threads: int | None = None,
    keep_gradients: bool = True,
    shards: int = 1,
    context: int = 1,
) -> int:
    """Return the longest sequence, in tokens, for which the step's peak is within the budget; 0 if not even one fits.

    Arguments are those of :func:`plan`; ``example_inputs`` must be a function of ``(batch_size, seq_len)``. Settings
    are not changed: to use leaner ones, merge ``plan(…, budget=…).settings`` into the configuration. The result fits
    with one part in 128 of the budget left free, is within 1 part in 256 of the longest that does, and from 4096
    tokens on is a multiple of 64. A Transformer with learned positions gets at most as many tokens as positions.

    Examples:
        >>> from memory_efficient_attention_pytorch import max_seq_len
        >>> config = dict(num_tokens=256, max_seq_len=1000, dim=64, depth=2, causal=True)
        >>> max_seq_len(config, budget="8GiB", device="cuda")  # learned positions: no more than there are
        1000
    """
    fits = example_inputs is None or callable(example_inputs)
    require(fits, "example_inputs", "a function of (batch_size, seq_len)", type(example_inputs).__name__)
    types = _dtype(dtype, "dtype"), _dtype(autocast, "autocast")
    rest = optimizer, *types, example_inputs, loss_fn, training, keep_gradients, shards, context
    workload = Workload(model_or_config, batch_size, 1, *rest)
    accounting = accounting_for(chosen_device(device, model_or_config), threads)
    return longest(workload, accounting, parse_size(budget))


def _dtype(value: torch.dtype | str | None, argument: str) -> torch.dtype | None:
    if value is None or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    expected = f"a floating-point torch.dtype, None or one of {', '.join(DTYPES)}"
    require(isinstance(value, str) and value in DTYPES, argument, expected, repr(value))
    return DTYPES[str(value)]


def chosen_device(device: torch.device | str | None, subject: Config | nn.Module) -> torch.device:
    """Return the device that is planned for: ``device``, by default the module's or the one at hand."""
    if device is None:
        tensor = None if isinstance(subject, Mapping) else next(subject.parameters(), None)
        if tensor is None or tensor.device.type == "meta":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return tensor.device
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected cpu, cuda or another device of PyTorch's, got {device!r}") from error
    require(found.type != "meta", "device", "a device with memory, such as cpu or cuda", "meta")
    return found
