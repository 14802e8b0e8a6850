"""Cross-entropy of a linear layer's output, the logits existing one chunk of tokens at a time.

Letters: N tokens, d hidden width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..attention.request import full_precision
from ..common.dry_run import each, working_on
from ..common.errors import require, require_positive_int
from ..common.gradients import accumulator, fresh_total, left_to_add, may_add_in_place, once_differentiable
from ..common.products import add_product, linear_into

REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``labels`` without the ``(N, V)`` logits.

    Equal to ``F.cross_entropy(F.linear(hidden, weight, bias), labels, ...)``: with logits x, label y and smoothing e,
    ``loss = logsumexp(x) - (1 - e) x_y - e mean(x)``, and 0 where the label is ``ignore_index``; ``"mean"`` divides the
    sum by the number of the other labels. With none of those the mean is 0 with zero gradients (PyTorch's is NaN).

    Args:
        hidden: ``(..., d)``, floating point.
        weight: ``(V, d)``.
        labels: ``(...)`` int64, each in ``[0, V)`` or equal to ``ignore_index``.
        bias: ``(V,)`` or None.
        ignore_index: tokens with this label add nothing to the loss, to the count or to the gradients.
        reduction: ``"none"`` (a loss per token, shaped like labels), ``"mean"`` or ``"sum"`` (a scalar).
        label_smoothing: the share of each target that is spread evenly over the vocabulary, in ``[0, 1]``.
        chunk_size: the most tokens whose logits exist at once, :func:`default_chunk_size` if None. It changes memory
            and time, and the result by rounding only.

    Returns:
        The loss in fp32, for fp64 in fp64. Gradients have the dtypes of their tensors.

    ``"mean"`` and ``"sum"`` compute the gradients in the forward pass, while the logits are there: what comes in
    backward is one number, and can only scale them. ``"none"`` computes the logits a second time in backward, four
    products instead of three; so do the others where a weight with ``V > N`` has a ``.grad`` of earlier batches, which
    backward can then add to in place (see :func:`gradients_wait`). Neither computes a gradient that nobody asks for, so
    under ``no_grad`` there is only the loss.

    Memory beyond the inputs: ``c V`` for the logits, ``N d`` and ``V d`` for the gradients; the latter not where it is
    added to ``weight.grad``. Softmax, loss and the accumulation of the weight's gradient are in fp32. Matrix products
    of fp16, of bf16 and under autocast run in that dtype, at the price of a second ``c V`` in it; those of fp16 run in
    fp32 on a CPU, where that is many times faster.

    Differentiable once; forward-mode differentiation and ``torch.func`` are not supported.

    Raises:
        ValueError: on a wrong shape, dtype, device or option, and on a CPU on a label out of range. Other devices
            assert on such a label themselves: looking at it here would make the host wait for them.
    """
    settings = check(hidden, weight, labels, bias, ignore_index, reduction, label_smoothing, chunk_size)
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1))
    # Inside a Function gradients are off whatever the caller chose, so whether any is wanted must be asked here.
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if reduction != "none" and wanted and not gradients_wait(settings, hidden, weight):
        return _LinearCrossEntropy.apply(settings, *tensors)
    losses = _LinearCrossEntropyOfTokens.apply(settings, *tensors)
    return losses.view(labels.shape) if reduction == "none" else reduced(settings, losses, tensors[3])


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits exist at once unless the caller says: 128, or as many as 2**18 logits if that is more.

    On a CPU fewer rows make the matrix products repack the weight too often and more gain little. Accelerators get 1024
    instead of 128, so that reading and writing the ``(V, d)`` tensors once a chunk does not outweigh the products.
    """
    return max(128 if device.type == "cpu" else 1024, 2**18 // vocabulary)


class ChunkLoss:
    """The losses of one chunk of tokens after another, and the gradients of their weighted sum.

    The weight's and the bias's gradients accumulate over the calls; the logits' buffer is the same in every call. A
    caller that makes each chunk's hidden vectors just before (to norm them, say) calls this instead of the function.

    Args:
        weight, bias: as in :func:`linear_cross_entropy`.
        chunk_size: the most tokens a call may bring.
        product_dtype: dtype of the matrix products; everything else is in fp32, for fp64 in fp64.
        label_smoothing: as in :func:`linear_cross_entropy`.
        weight_gradient, bias_gradient: whether to accumulate ``grad_weight (V, d)`` and ``grad_bias (V,)``.
        total: makes what these accumulate in, from weight and bias: zeros, or in a backward pass ``accumulator``.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        chunk_size: int,
        product_dtype: torch.dtype,
        label_smoothing: float = 0.0,
        weight_gradient: bool = False,
        bias_gradient: bool = False,
        total: Callable[[Tensor], Tensor] = fresh_total,
    ) -> None:
        vocabulary, dtype = len(weight), _full_dtype(weight.dtype)
        self.weight = weight.to(product_dtype)
        self.bias = bias
        self.label_smoothing = label_smoothing
        self.logits = weight.new_empty(chunk_size, vocabulary, dtype=dtype)
        self.products = self.logits
        if product_dtype != dtype:
            self.products = weight.new_empty(chunk_size, vocabulary, dtype=product_dtype)
        self.grad_weight = total(weight) if weight_gradient else None
        self.grad_bias = total(bias) if bias_gradient and bias is not None else None

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

    def add_gradients(self, hidden: Tensor, labels: Tensor, row_weight: Tensor, grad_hidden: Tensor | None) -> None:
        """Differentiate ``sum(row_weight * losses)`` of the chunk that :meth:`losses` just had; row_weight ``(c,)``.

        The hidden vectors' gradient is written to ``grad_hidden (c, d)``.
        """
        logits, products = self.logits[: len(hidden)], self.products[: len(hidden)]
        target = 1 - self.label_smoothing
        logits.scatter_add_(1, labels[:, None], logits.new_full((len(hidden), 1), -target))
        if self.label_smoothing:
            logits.sub_(self.label_smoothing / logits.shape[1])
        if self.grad_bias is not None:
            self.grad_bias.addmv_(logits.T, row_weight)
        if products.dtype == logits.dtype:
            # Weighting the rows of the two (c, d) matrices spares a pass over the (c, V) one.
            if self.grad_weight is not None:
                add_product(self.grad_weight, logits, hidden * row_weight[:, None])
            if grad_hidden is not None:
                product = linear_into(logits.new_empty(grad_hidden.shape), logits, self.weight.T)
                torch.mul(product, row_weight[:, None], out=grad_hidden)
            return
        products.copy_(logits.mul_(row_weight[:, None]))
        if self.grad_weight is not None:
            add_product(self.grad_weight, products, hidden.to(products.dtype))
        if grad_hidden is not None:
            grad_hidden.copy_(products @ self.weight)


class Settings(NamedTuple):
    """The options of a loss, checked."""

    ignore_index: int
    label_smoothing: float
    chunk_size: int
    product_dtype: torch.dtype
    divide_by_count: bool


class Rows:
    """Where hidden vectors come from and their gradients go, chunk by chunk; these lie in memory as a whole.

    hidden, gradient: ``(N, d)``; no gradient is wanted without the second.
    """

    def __init__(self, hidden: Tensor, gradient: Tensor | None = None) -> None:
        self.hidden, self.gradient = hidden, gradient

    def take(self, chunk: slice) -> Tensor:
        """The chunk's hidden vectors ``(c, d)``."""
        return self.hidden[chunk]

    def room(self, chunk: slice) -> Tensor | None:
        """Where to write their gradient, or None."""
        return None if self.gradient is None else self.gradient[chunk]

    def written(self, chunk: slice, gradient: Tensor) -> None:
        """Called when ``gradient``, made by :meth:`room`, is there."""


Gradients = tuple[Tensor | None, Tensor | None]


def run(
    settings: Settings,
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None = None,
    wanted: tuple[bool, ...] = (False, False, False),
    total: Callable[[Tensor], Tensor] = fresh_total,
) -> tuple[Tensor, Gradients]:
    """Losses ``(N,)``, 0 where ignored, and the gradients of ``sum(row_weight * losses)`` for weight and bias.

    row_weight: ``(N,)`` or one for all. wanted: the gradients of the rows (which go to ``rows``), of the weight and of
    the bias; the latter two are added to what ``total`` makes, in its dtype.
    """
    counted = labels != settings.ignore_index
    labels = labels.masked_fill(~counted, 0)
    losses = weight.new_empty(len(labels), dtype=_full_dtype(weight.dtype))
    nothing = losses.new_zeros(())
    row_weight = torch.where(counted, nothing if row_weight is None else row_weight, nothing)
    size = _even_chunk_size(len(labels), settings.chunk_size)
    with working_on("loss"), full_precision(weight.device):
        chunk_loss = ChunkLoss(
            weight,
            bias,
            chunk_size=size,
            product_dtype=settings.product_dtype,
            label_smoothing=settings.label_smoothing,
            weight_gradient=wanted[1],
            bias_gradient=wanted[2],
            total=total,
        )
        for chunk in each(_chunks(labels, size)):
            hidden = rows.take(chunk)
            losses[chunk] = chunk_loss.losses(hidden, labels[chunk])
            if any(wanted):
                room = rows.room(chunk) if wanted[0] else None
                chunk_loss.add_gradients(hidden, labels[chunk], row_weight[chunk], room)
                if room is not None:
                    rows.written(chunk, room)
    return losses.masked_fill_(~counted, 0), (chunk_loss.grad_weight, chunk_loss.grad_bias)


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean or sum: gradients in forward, but for a power of two, by which backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        share, early, late = share_of_each(settings, labels, _full_dtype(hidden.dtype))
        wanted = ctx.needs_input_grad[1:4]
        rows = Rows(hidden, torch.empty_like(hidden) if wanted[0] else None)
        losses, gradients = run(settings, rows, weight, bias, labels, early, wanted)
        ctx.dtypes = [x if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(late, rows.gradient, *gradients)
        return losses.sum() * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        late, *gradients = ctx.saved_tensors
        return None, *scaled(gradients, grad_loss * late, ctx.dtypes), None


class _LinearCrossEntropyOfTokens(torch.autograd.Function):
    """A loss per token: gradients wait for those that come in, so backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(hidden, weight, bias, labels)
        return run(settings, Rows(hidden), weight, bias, labels)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        rows = Rows(hidden, torch.empty_like(hidden) if wanted[0] else None)
        of_head = gradients_of_head(ctx.settings, rows, weight, bias, labels, grad_losses, wanted)
        return None, rows.gradient, *of_head, None


def gradients_of_head(
    settings: Settings,
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad_losses: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """What backward returns for weight and bias, given the losses' gradients ``(N,)``; the rest as in :func:`run`."""
    _, totals = run(settings, rows, weight, bias, labels, grad_losses.contiguous(), wanted, accumulator)
    pairs = zip((weight, bias), totals, strict=True)
    return [None if leaf is None or total is None else left_to_add(leaf, total) for leaf, total in pairs]


def gradients_wait(settings: Settings, hidden: Tensor, weight: Tensor) -> bool:
    """Do gradients wait for backward, though the loss is one number? hidden: ``(…, d)``, weight: ``(V, d)``.

    They do where the weight's is larger than the hidden vectors', and the weight has a ``.grad`` that backward can add
    to: made in the forward pass it would exist beside that. Not with products in fp16, which take a loss scaler's
    factor only after they are rounded (see :func:`share_of_each`).
    """
    large = weight.numel() > hidden.numel() and settings.product_dtype != torch.float16
    return large and may_add_in_place(weight)


def reduced(settings: Settings, losses: Tensor, labels: Tensor) -> Tensor:
    """The sum or the mean of losses ``(N,)``, which are 0 where the label is ignored."""
    return losses.sum() * share_of_each(settings, labels, losses.dtype)[0]


def scaled(
    gradients: Sequence[Tensor | None], factor: Tensor, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """``factor`` times each gradient, in its tensor's dtype, inside a backward pass that saved them."""
    # A graph that is not kept has no more use for these: scaling them in place spares a second (V, d).
    kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    scale = torch.mul if kept else Tensor.mul_
    return [x if x is None else scale(x, factor).to(dtype) for x, dtype in zip(gradients, dtypes, strict=True)]


def share_of_each(settings: Settings, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What multiplies the sum of losses (one over the number of labels that count, or one), and its two factors.

    Gradients take the first, in [1/2, 1], when they are made and the second, a power of two, in backward. So they are
    rounded once, and one kept in fp16 has not lost its small values before a loss scaler's factor comes to save them.
    """
    one = torch.ones((), dtype=dtype, device=labels.device)
    if not settings.divide_by_count:
        return one, one, one
    share = one / (labels != settings.ignore_index).sum().clamp_min(1)
    early, _ = torch.frexp(share)
    return share, early, share / early


def _even_chunk_size(tokens: int, chunk_size: int) -> int:
    """The same number of chunks, as equal as can be, so that no small one is left over."""
    chunks = max(1, -(-tokens // chunk_size))
    return max(1, -(-tokens // chunks))


def _chunks(labels: Tensor, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(labels), size)]


def _full_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    dtype = _autocast_dtype(hidden) or hidden.dtype
    # Few CPUs multiply fp16, and the others take tens of times as long as for fp32.
    return torch.float32 if dtype == torch.float16 and hidden.device.type == "cpu" else dtype


def check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    chunk_size: int | None,
) -> Settings:
    """Validate the arguments of :func:`linear_cross_entropy`; of ``hidden`` only shape, dtype and device matter."""
    require(hidden.dim() >= 1, "hidden", "shape (..., width)", tuple(hidden.shape))
    require(hidden.is_floating_point(), "hidden", "a floating-point dtype", hidden.dtype)
    width = hidden.shape[-1]
    require(weight.dim() == 2 and weight.shape[1] == width, "weight", f"shape (V, {width})", tuple(weight.shape))
    require(weight.shape[0] > 0, "weight", "at least one row", tuple(weight.shape))
    require(labels.shape == hidden.shape[:-1], "labels", f"shape {tuple(hidden.shape[:-1])}", tuple(labels.shape))
    require(labels.dtype == torch.int64, "labels", "dtype torch.int64", labels.dtype)
    vocabulary = weight.shape[0]
    if bias is not None:
        require(bias.shape == (vocabulary,), "bias", f"shape ({vocabulary},)", tuple(bias.shape))
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None:
            require(tensor.device == hidden.device, name, f"hidden's device, {hidden.device}", tensor.device)
    _check_dtypes(hidden, weight, bias)
    require(reduction in REDUCTIONS, "reduction", f"one of {REDUCTIONS}", repr(reduction))
    require(0 <= label_smoothing <= 1, "label_smoothing", "a number in [0, 1]", repr(label_smoothing))
    if chunk_size is not None:
        require_positive_int("chunk_size", chunk_size)
    _check_labels(labels, vocabulary, ignore_index)
    return Settings(
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        chunk_size=chunk_size or default_chunk_size(vocabulary, hidden.device),
        product_dtype=_product_dtype(hidden),
        divide_by_count=reduction == "mean",
    )


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if _autocast_dtype(hidden) is None:
            require(tensor.dtype == hidden.dtype, name, f"hidden's dtype, {hidden.dtype}", tensor.dtype)
        else:
            autocast = tensor.is_floating_point() and tensor.dtype != torch.float64
            require(autocast, name, "a dtype that autocast converts (fp32, bf16 or fp16)", tensor.dtype)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if labels.device.type != "cpu" or isinstance(labels, FakeTensor) or torch.compiler.is_compiling():
        return
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        expected = f"each in [0, {vocabulary}) or ignore_index, {ignore_index}"
        raise ValueError(f"labels: expected {expected}, got {labels[outside][0].item()}")
