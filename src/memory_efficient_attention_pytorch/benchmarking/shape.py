"""The shape in which every system of a comparison is built."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..common.errors import require, require_positive_int
from ..models.config import KNOBS, TransformerConfig, knob

BYTES_PER_NUMBER = 4  # the unit counts numbers of 4 bytes, whatever precision a system computes in


@dataclass(frozen=True)
class Shape:
    """The shape of a causal language model and its batch.

    Raises ValueError for sizes below 1, or heads that do not divide ``dim``.
    """

    seq_len: int = field(default=8192, metadata=knob("tokens in a sequence"))
    batch_size: int = field(default=1, metadata=knob("sequences in a batch"))
    dim: int = field(default=512, metadata=KNOBS["dim"])
    depth: int = field(default=4, metadata=KNOBS["depth"])
    heads: int = field(default=TransformerConfig.heads, metadata=KNOBS["heads"])
    ff_mult: int = field(default=TransformerConfig.ff_mult, metadata=KNOBS["ff_mult"])
    num_tokens: int = field(default=256, metadata=KNOBS["num_tokens"])

    def __post_init__(self) -> None:
        for name in SHAPE_FIELDS:
            require_positive_int(name, getattr(self, name))
        require(self.dim % self.heads == 0, "heads", f"a divisor of dim ({self.dim})", self.heads)

    @property
    def dim_head(self) -> int:
        return self.dim // self.heads

    @property
    def unit_bytes(self) -> int:
        """Bytes of one activation of the whole batch in fp32: tokens · dim · 4."""
        return self.batch_size * self.seq_len * self.dim * BYTES_PER_NUMBER

    def describe(self) -> str:
        """Return in words what differs between the runs of a comparison."""
        layers = f"{self.depth} layer{'s' if self.depth > 1 else ''}"
        return f"{self.seq_len} tokens, {layers}, vocabulary {self.num_tokens}"

    def forward_flops(self, window: int | None = None) -> int:
        """Return the floating-point operations of a forward pass, without attention's masked half.

        Used to predict a run's time from earlier ones, not to rate any system.
        """
        tokens = self.batch_size * self.seq_len
        keys = min(self.seq_len / 2, window) if window is not None else self.seq_len / 2
        products = self.dim * (4 + 2 * self.ff_mult) + 2 * keys
        return int(2 * tokens * self.dim * (self.depth * products + self.num_tokens))


SHAPE_FIELDS = tuple(each.name for each in fields(Shape))
