"""The arithmetic of one chunk of tokens: logits, losses, gradients.

Letters in this folder: N tokens, d hidden width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.divided import Divided
from ..common.precision import full_dtype
from ..common.products import add_product, linear_into


class Settings(NamedTuple):
    """The validated options of a loss.

    ``product_dtype``: of the matrix products; everything else is in fp32, for fp64 in fp64. ``softcap``: 0 for none.
    ``gradients_wait``: gradients are computed in backward, else in forward. ``divided``: the division of tokens over
    processes, if any.
    """

    ignore_index: int
    label_smoothing: float
    reduction: str
    chunk_size: int
    product_dtype: torch.dtype
    scale: float = 1.0
    softcap: float = 0.0
    z_loss: float = 0.0
    gradients_wait: bool = False
    divided: Divided | None = None


class ChunkLoss:
    """Computes losses chunk by chunk, and the gradients of their weighted sum, in one buffer for logits.

    Args:
        weight, bias: ``(V, d)``, and ``(V,)`` or None.
        of_head: tensors that the gradients of weight and bias are added to, None for one that is not needed.
        rows: the most tokens of a chunk.
        class_weights: ``(V,)`` or None.
        z_loss: factor of a row's squared log-sum-exp: a number, or a tensor that holds one; None for 0.
    """

    def __init__(
        self,
        settings: Settings,
        weight: Tensor,
        bias: Tensor | None,
        of_head: Sequence[Tensor | None],
        rows: int,
        class_weights: Tensor | None = None,
        z_loss: Tensor | float | None = None,
    ) -> None:
        dtype, product_dtype = full_dtype(weight.dtype), settings.product_dtype
        self.weight, self.bias = weight.to(product_dtype), bias
        self.settings, self.z_loss = settings, z_loss
        self.class_weights = None if class_weights is None else class_weights.to(dtype)
        self.logits = weight.new_empty(rows, len(weight), dtype=dtype)
        self.products = self.logits if product_dtype == dtype else torch.empty_like(self.logits, dtype=product_dtype)
        self.grad_weight, self.grad_bias = of_head

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the losses ``(c,)`` of hidden ``(c, d)`` and labels ``(c,)``; :meth:`add_gradients` may follow."""
        logits, products = self.logits[: len(hidden)], self.products[: len(hidden)]
        scale, softcap, smoothing = self.settings.scale, self.settings.softcap, self.settings.label_smoothing
        linear_into(products, hidden.to(products.dtype), self.weight)
        if products.dtype != logits.dtype:
            logits.copy_(products)
        if self.bias is not None:
            logits.add_(self.bias)
        if scale != 1:
            logits.mul_(scale)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        expected = logits.gather(1, labels[:, None]).squeeze(1)
        # mass: of a token's whole target, which is 1 without class weights; target: of its label alone.
        mass: Tensor | None = None
        self.target: Tensor | None = None
        if self.class_weights is not None:
            mass = self.target = self.class_weights[labels]
            expected.mul_(mass)
            if smoothing:
                mass = mass.lerp(self.class_weights.mean(), smoothing)
                expected.lerp_(logits.mv(self.class_weights).div_(logits.shape[1]), smoothing)
        elif smoothing:
            expected.lerp_(logits.mean(1), smoothing)
        largest = logits.amax(1)
        # The largest logit's probability is 1 / sum(exp(x - max(x))), so its logarithm is max(x) - logsumexp(x) without
        # another buffer.
        log_largest = self._softmax(logits, largest)
        self.factor = mass
        losses = (largest if mass is None else largest * mass) - expected
        losses.sub_(log_largest if mass is None else log_largest * mass)
        if self.z_loss is not None:
            lse = largest - log_largest
            losses.add_(self.z_loss * lse.square())
            self.factor = 2 * self.z_loss * lse + (1 if mass is None else mass)
        return losses

    def add_gradients(self, hidden: Tensor, labels: Tensor, row_weight: Tensor, of_hidden: bool) -> Tensor | None:
        """Differentiate ``sum(row_weight * losses)`` of the last chunk of :meth:`losses`; row_weight ``(c,)``.

        Returns the hidden vectors' gradient ``(c, d)`` if ``of_hidden``.
        """
        logits, products = self.logits[: len(hidden)], self.products[: len(hidden)]
        row_weight = row_weight[:, None] * self.settings.scale
        self._to_gradient(logits, labels)
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

    def _softmax(self, logits: Tensor, largest: Tensor) -> Tensor:
        """Turn logits into probabilities in place; return the logarithm of each row's largest ``(c,)``.

        Capped logits stay unchanged until gradients are computed, since the cap's slope follows from them.
        """
        if not self.settings.softcap:
            torch.softmax(logits, 1, out=logits)
            return logits.amax(1).log_()
        blocks = zip(logits.split(self._block), largest.split(self._block), strict=True)
        return torch.cat([(rows - top[:, None]).exp_().sum(1).log_().neg_() for rows, top in blocks])

    def _to_gradient(self, logits: Tensor, labels: Tensor) -> None:
        """Turn the probabilities ``(c, V)`` of :meth:`_softmax` into the gradient of the losses, in place."""
        softcap = self.settings.softcap
        if not softcap:
            self._subtract_target(logits, labels, slice(None))
            return
        for start in range(0, len(logits), self._block):
            rows = slice(start, start + self._block)
            slope = logits[rows].div(softcap).square_().neg_().add_(1)
            torch.softmax(logits[rows], 1, out=logits[rows])
            self._subtract_target(logits[rows], labels[rows], rows)
            logits[rows].mul_(slope)

    def _subtract_target(self, probabilities: Tensor, labels: Tensor, rows: slice) -> None:
        smoothing, classes = self.settings.label_smoothing, probabilities.shape[1]
        if self.factor is not None:
            probabilities.mul_(self.factor[rows, None])
        if self.target is None:
            target = probabilities.new_full((len(labels), 1), smoothing - 1)
        else:
            target = self.target[rows, None] * (smoothing - 1)
        probabilities.scatter_add_(1, labels[:, None], target)
        if smoothing:
            of_all = smoothing / classes
            probabilities.sub_(of_all if self.class_weights is None else self.class_weights * of_all)

    @property
    def _block(self) -> int:
        """Rows of capped logits that are processed at once, so that temporary tensors stay small."""
        return max(1, len(self.logits) // 16)
