"""Log-sum-exps and largest biases of rows, as fp32 holds them: huge ones apart from what it would round away."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dry_run import device_type
from ..torch_internals.tensors import is_fake
from .request import ROUNDED_AWAY


class LogSumExp(NamedTuple):
    """Each row's log-sum-exp ``(b, h, i)`` as a sum of two parts.

    The first is the level of the row's scores, −∞ if it sees nothing; the second is the rest, which fp32 would round
    away beside a level of millions."""

    high: Tensor
    low: Tensor

    @staticmethod
    def of(low: Tensor, *levels: Tensor | None) -> LogSumExp:
        """Return the sum of levels, where given, and ``low``, which is −∞ where nothing is seen."""
        high = torch.zeros_like(low)
        for level in levels:
            if level is None:
                continue
            high, lost = two_sum(high, finite(level))
            low = low + lost
        return LogSumExp(high.masked_fill(low == float("-inf"), float("-inf")), low)

    def below(self, level: Tensor) -> Tensor:
        """Return a tile's level of biases ``(b, h, i, 1)`` less this, ``(b, h, i)``."""
        return (level.squeeze(-1) - self.high) - self.low

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Return the sum as one number, and its rounding error."""
        high = finite(self.high)
        total = high + self.low
        return total, ((high - total) + self.low).masked_fill(total == float("-inf"), 0.0)


def merge(out: Tensor, lse: LogSumExp, other: Tensor, other_lse: LogSumExp) -> tuple[Tensor, LogSumExp]:
    """Merge the results of attention over two disjoint sets of keys."""
    high = torch.maximum(lse.high, other_lse.high)
    mine, others = (part.low + (part.high - finite(high)) for part in (lse, other_lse))
    low = torch.logaddexp(mine, others)
    shares = (torch.exp(part - finite(low)).unsqueeze(-1) for part in (mine, others))
    return out * next(shares) + other * next(shares), LogSumExp(high, low)


def less_level(added: Tensor) -> tuple[Tensor, Tensor]:
    """Return an additive mask less its largest value in each row, and that value (−∞ if the row has no other)."""
    level = added.amax(dim=-1, keepdim=True)
    return added - finite(level), level


def finite(level: Tensor) -> Tensor:
    """Replace −∞ by 0."""
    return level.masked_fill(level == float("-inf"), 0.0)


def rounded_away(level: Tensor) -> Tensor | None:
    """Return in which rows the largest bias is so huge that scores count as equal; None if a CPU knows of none.

    level: as of :meth:`.Scores.relative`. See ``ROUNDED_AWAY``.
    """
    rows = finite(level).abs() >= ROUNDED_AWAY
    if device_type(level.device) != "cpu":
        return rows
    unknown = is_fake(level) or torch.compiler.is_compiling()
    return None if unknown or not rows.any() else rows


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and its rounding error (Knuth's TwoSum)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
