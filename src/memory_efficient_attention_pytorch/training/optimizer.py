"""The optimizer of a run, and its learning rate at each step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from .config import TrainConfig


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices only, not on biases and norms."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One kernel for all parameters; otherwise each takes a dozen small operations, each of which wakes the threads.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate at a step: linear warm-up, then a cosine down to `final_learning_rate` times the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)
