"""Cross-entropy of a linear layer's output, with logits for one chunk of tokens at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.dry_run import device_type
from ..common.errors import require, require_positive_int
from ..common.precision import COMPUTED, autocast_dtype
from .chunk import Settings
from .function import chunked_loss
from .rows import RowSource, WholeRows

REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    hidden: Tensor | RowSource,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    class_weights: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Compute the cross-entropy of ``hidden @ weight.T + bias`` and ``labels`` without the ``(N, V)`` logits.

    N is the number of tokens, d the width of a hidden vector, V the vocabulary and c the tokens of a chunk.

    Equal to ``F.cross_entropy(F.linear(hidden, weight, bias), labels, ...)``: with logits x, label y and smoothing e,
    ``loss = logsumexp(x) - (1 - e) x_y - e mean(x)``, and 0 where the label is ``ignore_index``; ``"mean"`` divides the
    sum by the number of the other labels. With none of those the mean is 0 with zero gradients (PyTorch's is NaN).
    For a mean over another count, such as that of an accumulated batch, divide the ``"sum"``.

    The logits are ``x = scale (hidden @ weight.T + bias)``, and with a softcap ``softcap · tanh(x / softcap)`` of that
    (Gemma Team 2024, arXiv:2408.00118). ``z_loss`` adds its multiple of ``logsumexp(x)²`` to each token's loss;
    ``"mean"`` averages these terms without class weights (PaLM, Chowdhery et al. 2022, arXiv:2204.02311).

    Args:
        hidden: ``(..., d)``, floating point; or a :class:`RowSource`, which makes these vectors chunk by chunk.
        weight: ``(V, d)``.
        labels: ``(...)`` int64, each in ``[0, V)`` or equal to ``ignore_index``.
        bias: ``(V,)`` or None.
        ignore_index: tokens with this label add nothing to the loss, to the count or to the gradients.
        reduction: ``"none"`` (a loss per token, shaped like labels), ``"mean"`` or ``"sum"`` (a scalar).
        label_smoothing: the share of each target that is spread evenly over the vocabulary, in ``[0, 1]``.
        chunk_size: the most tokens whose logits exist at once, :func:`default_chunk_size` if None. It changes memory
            and time, and the result by rounding only.
        class_weights: ``(V,)``, floating point, the ``weight`` of F.cross_entropy, which multiplies each class's terms;
            ``"mean"`` then divides by the sum of the labels' weights. It may not require a gradient.
        scale: multiplies the logits (Granite, Cohere).
        softcap: a positive bound of the logits, None for none.
        z_loss: coefficient of the squared log-sum-exp, at least 0.

    Returns:
        The loss in fp32, for fp64 in fp64. Gradients have the dtypes of their tensors.

    ``"mean"`` and ``"sum"`` compute the gradients in the forward pass, while the logits exist: backward receives
    one number, which can only scale them. ``"none"`` computes the logits a second time in backward and so takes four
    matrix products instead of three. The other two do the same where a weight with ``V > N`` has a ``.grad`` from
    earlier batches, to which backward can add in place. A gradient that is not needed is not computed; under
    ``no_grad`` there is only the loss.

    Memory beyond the inputs: ``c V`` for the logits, ``N d`` and ``V d`` for the gradients of hidden and weight. The
    weight's gradient takes no memory of its own where it is added to ``weight.grad``. Softmax, loss and the sum that
    becomes the weight's gradient are in fp32. Matrix products of fp16, of bf16 and under autocast run in that dtype and
    take a second ``c V`` in it. On a CPU those of fp16 run in fp32, which is many times faster there.

    Differentiable once; forward-mode differentiation and ``torch.func`` are not supported.

    Raises:
        ValueError: a wrong shape, dtype, device or option; on a CPU also a label out of range. Other devices assert
            such labels themselves, since a check on the host would have to wait for them.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from memory_efficient_attention_pytorch import linear_cross_entropy
        >>> hidden, weight = torch.randn(4, 100, 64, requires_grad=True), torch.randn(5000, 64, requires_grad=True)
        >>> labels = torch.randint(0, 5000, (4, 100))
        >>> loss = linear_cross_entropy(hidden, weight, labels)
        >>> loss.backward()
        >>> torch.allclose(loss, F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten()))
        True
    """
    source = hidden if isinstance(hidden, RowSource) else RowSource(hidden.shape, hidden.dtype, (hidden,), WholeRows)
    product_dtype = _check_tensors(source, weight, labels, bias)
    if class_weights is not None:
        _check_class_weights(class_weights, weight)
    require(reduction in REDUCTIONS, "reduction", f"one of {REDUCTIONS}", repr(reduction))
    require(0 <= label_smoothing <= 1, "label_smoothing", "a number in [0, 1]", repr(label_smoothing))
    if chunk_size is not None:
        require_positive_int("chunk_size", chunk_size)
    require(_is_finite(scale), "scale", "a finite number", repr(scale))
    positive = softcap is None or (_is_finite(softcap) and softcap > 0)
    require(positive, "softcap", "a positive number or None", repr(softcap))
    require(_is_finite(z_loss) and z_loss >= 0, "z_loss", "a finite number of at least 0", repr(z_loss))
    _check_labels(labels, len(weight), ignore_index)
    chunk_size = chunk_size or default_chunk_size(len(weight), source.device)
    settings = Settings(
        *(ignore_index, float(label_smoothing), reduction, chunk_size, product_dtype),
        scale=float(scale),
        softcap=float(softcap or 0),
        z_loss=float(z_loss),
    )
    loss = chunked_loss(settings, source, weight, bias, labels.reshape(-1), class_weights)
    return loss.view(labels.shape) if reduction == "none" else loss


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Return the default number of tokens per chunk: 128, or as many as make 2**18 logits if that is more.

    On a CPU fewer rows make the matrix products repack the weight too often, and more gain little. Accelerators get
    1024 instead of 128, so that reading and writing the ``(V, d)`` tensors per chunk does not outweigh the products.
    """
    return max(128 if device_type(device) == "cpu" else 1024, 2**18 // vocabulary)


def _check_tensors(hidden: RowSource, weight: Tensor, labels: Tensor, bias: Tensor | None) -> torch.dtype:
    """Validate the tensors of :func:`linear_cross_entropy`; return the dtype of their matrix products."""
    require(len(hidden.shape) >= 1, "hidden", "shape (..., width)", tuple(hidden.shape))
    require(hidden.dtype in COMPUTED, "hidden", "a floating-point dtype of 16 bits or more", hidden.dtype)
    width = hidden.shape[-1]
    require(weight.dim() == 2 and weight.shape[1] == width, "weight", f"shape (V, {width})", tuple(weight.shape))
    require(weight.shape[0] > 0, "weight", "at least one row", tuple(weight.shape))
    require(labels.shape == hidden.shape[:-1], "labels", f"shape {tuple(hidden.shape[:-1])}", tuple(labels.shape))
    require(labels.dtype == torch.int64, "labels", "dtype torch.int64", labels.dtype)
    if bias is not None:
        require(bias.shape == weight.shape[:1], "bias", f"shape ({len(weight)},)", tuple(bias.shape))
    autocast = None if hidden.dtype == torch.float64 else autocast_dtype(hidden.device)
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is None:
            continue
        require(tensor.device == hidden.device, name, f"hidden's device, {hidden.device}", tensor.device)
        if name != "labels" and autocast is None:
            require(tensor.dtype == hidden.dtype, name, f"hidden's dtype, {hidden.dtype}", tensor.dtype)
        elif name != "labels":
            converted = tensor.is_floating_point() and tensor.dtype != torch.float64
            require(converted, name, "a dtype that autocast converts (fp32, bf16 or fp16)", tensor.dtype)
    product_dtype = autocast or hidden.dtype
    # Few CPUs multiply fp16; the others take tens of times as long as for fp32.
    slow = product_dtype == torch.float16 and device_type(hidden.device) == "cpu"
    return torch.float32 if slow else product_dtype


def _check_class_weights(class_weights: Tensor, weight: Tensor) -> None:
    name, shape = "class_weights", weight.shape[:1]
    require(isinstance(class_weights, Tensor), name, "a tensor", type(class_weights).__name__)
    require(class_weights.shape == shape, name, f"shape {tuple(shape)}", tuple(class_weights.shape))
    require(class_weights.is_floating_point(), name, "a floating-point dtype", class_weights.dtype)
    require(class_weights.device == weight.device, name, f"device {weight.device}", class_weights.device)
    require(not class_weights.requires_grad, name, "a tensor without gradient", "one that requires it")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    # A tensor of another type may have no values to check.
    if type(labels) is not Tensor or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if outside.any():
        expected = f"each in [0, {vocabulary}) or ignore_index, {ignore_index}"
        raise ValueError(f"labels: expected {expected}, got {labels[outside][0].item()}")
