"""Describe in words what a run uses and why."""

import torch

from ..attention.functional import select_backend
from .config import TrainConfig
from .trainer import Trainer


def describe(trainer: Trainer, parameters: int) -> str:
    """Return the choices of a run and their reasons, one a line. All processes have to call it."""
    config, accelerator, processes, corpus = trainer.config, trainer.accelerator, trainer.processes, trainer.corpus
    device = accelerator.device
    threads = torch.get_num_threads()
    where = str(device) if device.type != "cpu" else f"{threads} CPU thread{'s' if threads > 1 else ''}"
    if accelerator.num_processes > 1:
        where = f"{_division(config, accelerator.num_processes)}, each on {where}"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32)
    heads = (config.heads, config.kv_heads or config.heads, config.kv_heads or config.heads)
    # One element expanded to the run's shape: the choice depends on shapes and dtypes, not on values.
    windows = torch.zeros((), dtype=torch.long).expand(config.batch_size, config.seq_len)
    tokens = processes.own(windows, windows)[0].shape[1]
    shapes = [(config.batch_size, number, tokens, config.dim_head) for number in heads]
    q, k, v = (torch.zeros((), device=device, dtype=dtype).expand(shape) for shape in shapes)
    window = None if config.window is None else (config.window, 0)
    with processes.entered():
        choice = select_backend(q, k, v, causal=True, window=window, dropout=config.dropout)
    pieces = "for the memory budget" if config.memory_budget else "so that each stays small"
    if not config.reversible:
        reversal = "off, activations are stored"
    elif config.exact:
        reversal = "exact" + ("" if config.precision == "fp32" else f", since {config.precision} would round")
    else:
        reversal = "on, not exact" + (", since fp32 rounds little" if config.precision == "fp32" else "")
    kept = {True: ", kept for backward", "cpu": ", kept for backward in host memory"}.get(
        config.keep_attention or "", ""
    )
    held_out = f"{corpus.info.validation_tokens:,} to validate on ({corpus.info.split})"
    lines = [
        f"{parameters:,} parameters; {where}; {config.precision}",
        f"attention: {choice.name} ({choice.reason}){kept}",
        f"reversal: {reversal}",
        f"pieces: attention {config.head_chunks}, feed-forward {config.ff_chunks} ({pieces})",
        f"text: {corpus.info.train_tokens:,} tokens to train on, {held_out}",
    ]
    return "\n  ".join(lines)


def _division(config: TrainConfig, processes: int) -> str:
    """Return how the work is divided over processes, in words."""
    size = config.context_parallel or 1
    words = f"{processes} processes"
    if size > 1:
        words += f" ({processes // size} x {size}: windows x tokens)"
    return words + (" with the model divided among all" if config.shard else "")
