"""The plain loss, problems for it, and a comparison of ours with it."""

import math

import torch
import torch.nn.functional as F

from memory_efficient_attention_pytorch.loss.linear_cross_entropy import linear_cross_entropy
from tests.agreement import difference

# What a path may lose beyond the plain computation in the same dtype, relative to the largest value.
EPSILON = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def plain(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    class_weights=None,
    scale=1.0,
    softcap=None,
    z_loss=0.0,
    chunk_size=None,
    **options,
):
    logits, labels_of_all = scale * F.linear(hidden, weight, bias).flatten(0, -2), labels.flatten()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    of_classes = None if class_weights is None else class_weights.to(logits.dtype)
    loss = F.cross_entropy(logits, labels_of_all, weight=of_classes, **options)
    if z_loss:
        counted = labels_of_all != options.get("ignore_index", -100)
        squares = z_loss * logits.logsumexp(-1).square() * counted
        reduction = options.get("reduction", "mean")
        loss = loss + {"none": squares, "sum": squares.sum(), "mean": squares.sum() / counted.sum()}[reduction]
    return loss.view(labels.shape) if options.get("reduction") == "none" else loss


def problem(shape=(3, 17), width=12, vocabulary=29, dtype=torch.float32, bias=True, ignored=0.25, ignore_index=-100):
    """Differentiable hidden, weight, bias (or None), and labels of which some are ignored."""
    hidden = torch.randn(*shape, width)
    weight = torch.randn(vocabulary, width) / math.sqrt(width)
    labels = torch.randint(vocabulary, shape)
    labels[torch.rand(shape) < ignored] = ignore_index
    tensors = [hidden, weight, torch.randn(vocabulary)] if bias else [hidden, weight]
    hidden, weight, *rest = (x.to(dtype).requires_grad_() for x in tensors)
    return hidden, weight, rest[0] if rest else None, labels


def outcome(function, hidden, weight, bias, labels, *, incoming=None, dtype=None, **options):
    """The loss and every gradient, computed on copies, in another dtype if one is given."""
    copies = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden, weight, bias)]
    loss = function(copies[0], copies[1], labels, bias=copies[2], **options)
    loss.backward(torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype))
    return [loss.detach(), *(x.grad for x in copies if x is not None)]


def assert_as_good_as_plain(tensors, *, incoming=None, autocast=None, **options):
    dtype = autocast or tensors[0].dtype
    own = {name: options[name] for name in options if name != "chunk_size"}
    truth = outcome(plain, *tensors, incoming=incoming, dtype=torch.float64, **own)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        naive = outcome(plain, *tensors, incoming=incoming, **own)
        fast = outcome(linear_cross_entropy, *tensors, incoming=incoming, **options)
    for name, a, b, t in zip(("loss", "hidden", "weight", "bias"), fast, naive, truth, strict=False):
        assert a.shape == t.shape
        assert difference(a, t) <= difference(b, t) + EPSILON[dtype], name
    assert [x.dtype for x in fast[1:]] == [x.dtype for x in tensors[:3] if x is not None]
    return fast
