"""What a plan says: the peak of a step, what it consists of, and what else would fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..common.errors import require
from ..common.sizes import format_size, parse_size
from .timeline import CATEGORIES, Operation, Timeline


@dataclass(frozen=True)
class Option:
    """A way of running the step that was considered: its settings, peak in bytes and floating-point operations.

    Examples:
        >>> from memory_efficient_attention_pytorch import plan
        >>> from memory_efficient_attention_pytorch.planner import Option
        >>> config = dict(num_tokens=256, max_seq_len=4096, dim=64, depth=2, causal=True)
        >>> options = plan(config, batch_size=1, seq_len=4096, device="cuda", budget="1GiB").options
        >>> isinstance(options[0], Option), options[0].name
        (True, 'store everything')
    """

    name: str
    settings: Mapping[str, Any]
    peak_bytes: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """Holds what a training step needs.

    ``timeline`` has the bytes that are live during every operation. ``settings`` are the chosen Transformer keywords:
    without a budget the numbers of pieces that its layers choose, where more than one; with a budget the fastest
    settings that fit, and ``options`` all that were considered on the way, fastest first. Where nothing fits,
    ``remedies`` has what would fit, each by itself: the largest ``batch_size``, ``seq_len`` or ``depth``, to within 1
    part in 32, and the ``budget`` needed, in bytes.

    Examples:
        >>> from memory_efficient_attention_pytorch import Plan, plan
        >>> config = dict(num_tokens=256, max_seq_len=4096, dim=64, depth=2, causal=True)
        >>> made = plan(config, batch_size=1, seq_len=4096, device="cuda", autocast="bf16")
        >>> isinstance(made, Plan), made.fits("1GiB"), made.peak.phase
        (True, True, 'backward')
    """

    timeline: Timeline
    device: torch.device
    batch_size: int | None
    seq_len: int | None
    budget: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    remedies: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the peak, what it consists of, the largest first, and whether it fits in the budget."""
        parts = sorted(((size, name) for name, size in self.breakdown.items() if size), reverse=True)
        listed = ", ".join(f"{name} {format_size(size)}" for size, name in parts)
        said = f"{format_size(self.peak_bytes)} at the peak ({self.peak.describe()}; {self.device}): {listed}"
        if self.budget is None:
            return said
        fits = f"fits in {format_size(self.budget)}" if self.fits() else f"does not fit in {format_size(self.budget)}"
        return "; ".join(part for part in (said, fits, self.advice) if part)

    def __repr__(self) -> str:
        # A dataclass's own would show every operation.
        return f"Plan({self})"

    @property
    def peak_bytes(self) -> int:
        """The most bytes live at once: parameters, gradients, optimizer state, activations and workspaces.

        The runtime is not included: the interpreter, PyTorch's own code, a CUDA context.
        """
        return self.timeline.peak_bytes

    @property
    def breakdown(self) -> dict[str, int]:
        """The bytes of each category at the peak; they add up to ``peak_bytes``."""
        return self.timeline.breakdown(self.timeline.peak)

    @property
    def peak(self) -> Operation:
        """The operation at the peak, with the module and the phase it ran in."""
        return self.timeline.operations[self.timeline.peak]

    @property
    def flops(self) -> float:
        """Floating-point operations of the step, two per multiply-add.

        Recomputation is included; scores that a kernel skips, or that are in no tile, are not.
        """
        return self.timeline.flops

    @property
    def advice(self) -> str | None:
        """The remedies in words; None where the step fits or there is no budget."""
        if not self.remedies:
            return None
        words = [_REMEDIES[name].format(amount) for name, amount in self.remedies.items() if name != "budget"]
        changes = " or ".join([*words, f"a budget of {format_size(self.remedies['budget'])}"]) + " would fit"
        if self.budget is None or self.state_bytes < self.budget:
            return changes
        return f"parameters, gradients and optimizer state alone take {format_size(self.state_bytes)}: {changes}"

    @property
    def state_bytes(self) -> int:
        """The most bytes that parameters, gradients and optimizer state take, whatever the batch and its length."""
        state = [CATEGORIES.index(name) for name in ("parameters", "gradients", "optimizer")]
        return int(self.timeline.live[:, state].sum(axis=1).max())

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the timeline, in types that JSON has."""
        return {
            "peak_bytes": self.peak_bytes,
            "breakdown": self.breakdown,
            "peak": self.peak._asdict(),
            "flops": self.flops,
            "device": str(self.device),
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "budget": self.budget,
            "fits": None if self.budget is None else self.fits(),
            "settings": dict(self.settings),
            "options": [asdict(option) for option in self.options],
            "remedies": dict(self.remedies),
            "advice": self.advice,
        }

    def fits(self, budget: int | float | str | None = None) -> bool:
        """Return whether the peak is within the budget (by default the one planned for).

        Raises ValueError without a budget here and in ``plan``.
        """
        limit = self.budget if budget is None else parse_size(budget)
        require(limit is not None, "budget", "a size such as 8GiB, since the plan was made without a budget", None)
        assert limit is not None
        return self.peak_bytes <= limit


_REMEDIES = {"batch_size": "a batch of {:,}", "seq_len": "sequences of {:,} tokens", "depth": "a depth of {}"}
