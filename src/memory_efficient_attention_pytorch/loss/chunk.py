"""The arithmetic of one chunk of tokens: logits, losses, gradients.

Letters of this room: N tokens, d hidden width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.precision import full_dtype
from ..common.products import add_product, linear_into


class Settings(NamedTuple):
    """The options of a loss, checked. ``gradients_wait``: for backward; otherwise forward makes them.

    ``product_dtype``: of the matrix products; everything else is in fp32, for fp64 in fp64.
    """

    ignore_index: int
    label_smoothing: float
    reduction: str
    chunk_size: int
    product_dtype: torch.dtype
    gradients_wait: bool = False


class ChunkLoss:
    """The losses of one chunk of tokens after another, and the gradients of their weighted sum.

    The logits' buffer is the same in every call.

    Args:
        weight, bias: ``(V, d)``, and ``(V,)`` or None.
        of_head: what the gradients of weight and bias are added to, None where nobody asks for one.
        rows: the most tokens a call may bring.
    """

    def __init__(
        self, settings: Settings, weight: Tensor, bias: Tensor | None, of_head: Sequence[Tensor | None], rows: int
    ) -> None:
        dtype, product_dtype = full_dtype(weight.dtype), settings.product_dtype
        self.weight, self.bias = weight.to(product_dtype), bias
        self.label_smoothing = settings.label_smoothing
        self.logits = weight.new_empty(rows, len(weight), dtype=dtype)
        self.products = self.logits if product_dtype == dtype else torch.empty_like(self.logits, dtype=product_dtype)
        self.grad_weight, self.grad_bias = of_head

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """``(c, d)`` and ``(c,)`` labels in ``[0, V)`` → losses ``(c,)``; :meth:`add_gradients` may follow."""
        logits, products = self.logits[: len(hidden)], self.products[: len(hidden)]
        linear_into(products, hidden.to(products.dtype), self.weight)
        if products.dtype != logits.dtype:
            logits.copy_(products)
        if self.bias is not None:
            logits.add_(self.bias)
        expected = logits.gather(1, labels[:, None]).squeeze(1)
        if self.label_smoothing:
            expected.lerp_(logits.mean(1), self.label_smoothing)
        largest = logits.amax(1)
        torch.softmax(logits, 1, out=logits)
        # The largest logit's probability is 1 / sum(exp(x - max(x))), so this is logsumexp(x) without another buffer.
        return (largest - expected).sub_(logits.amax(1).log_())

    def add_gradients(self, hidden: Tensor, labels: Tensor, row_weight: Tensor, of_hidden: bool) -> Tensor | None:
        """Differentiate ``sum(row_weight * losses)`` of the chunk that :meth:`losses` just had; row_weight ``(c,)``.

        Returns the hidden vectors' gradient ``(c, d)`` if that is asked for.
        """
        logits, products = self.logits[: len(hidden)], self.products[: len(hidden)]
        row_weight = row_weight[:, None]
        logits.scatter_add_(1, labels[:, None], logits.new_full((len(hidden), 1), self.label_smoothing - 1))
        if self.label_smoothing:
            logits.sub_(self.label_smoothing / logits.shape[1])
        if self.grad_bias is not None:
            self.grad_bias.addmv_(logits.T, row_weight[:, 0])
        if products.dtype == logits.dtype:
            # Weighting the rows of the two (c, d) matrices spares a pass over the (c, V) one.
            if self.grad_weight is not None:
                add_product(self.grad_weight, logits, hidden * row_weight)
            if not of_hidden:
                return None
            return linear_into(logits.new_empty(hidden.shape), logits, self.weight.T).mul_(row_weight)
        products.copy_(logits.mul_(row_weight))
        if self.grad_weight is not None:
            add_product(self.grad_weight, products, hidden.to(products.dtype))
        return products @ self.weight if of_hidden else None
