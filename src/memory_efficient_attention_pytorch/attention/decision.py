"""Choose how a request is computed: once, for forward, recomputation and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..common import contention
from ..common.autograd import once_differentiable
from ..common.divided import active
from ..common.errors import require
from ..common.precision import autocast_dtype, full_precision
from ..torch_internals.tensors import is_transformed
from .bias import BiasGradient
from .broadcasting import canonical_broadcast
from .cpu_kernel import CpuKernel
from .cuda_kernel import CudaKernel
from .naive import Naive
from .onednn import OneDnn
from .products import Products
from .request import AttentionRequest, build_request
from .sdpa import Sdpa
from .tiles import Tiled
from .way import BackwardInputs, Way
from .whole_kernels import Cpu, Efficient, Flash

WAYS: tuple[Way, ...] = (OneDnn(), Sdpa(), Cpu(), Flash(), Efficient(), CudaKernel(), CpuKernel(), Products(), Naive())
"""All ways of computing attention, preferred ones first."""

BACKENDS = tuple(dict.fromkeys(("naive", "tiled", "fused", "auto", *(way.name for way in WAYS))))
"""What a caller may ask for: a kind of way, ``"auto"`` for any, or a way by its own name."""

KEEPS_FOR_ITSELF = tuple(way.name for way in WAYS if way.by_autograd)
"""Those whose results cannot be kept for a repetition, since autograd keeps them."""


@dataclass(frozen=True)
class Decision:
    """A request and the way it is computed."""

    request: AttentionRequest
    way: Way

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, results: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output ``(b, h, n, e)`` and log-sum-exp ``(b, h, n)``, which may be None if not asked for.

        Differentiable once in q, k, v and the bias (a tensor or a module's parameters), also through the log-sum-exp.
        results: those of :meth:`compute` for the same q, k, v, which replace the forward pass.
        """
        if results is None and self.way.by_autograd:
            out, *lse = self.way.forward(self.request, q, k, v)
            return out, lse[0] if lse else None
        # Only autograd holds the tensors.
        without_tensors = replace(self, request=self.request.with_tensors())
        out, lse = _Attention.apply(without_tensors, results, q, k, v, *self.request.tensors)
        return out, lse

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Compute the results without gradients, to be kept; the output comes first."""
        with torch.no_grad(), full_precision(q.device):
            return self.way.forward(self.request, q, k, v)


def decide(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", keep: bool = False, **arguments: Any
) -> tuple[Decision, Tensor, Tensor, Tensor]:
    """Decide how :func:`dot_product_attention` computes these arguments; also return q, k and v cast by autocast.

    The way is the first of ``backend`` without a drawback, else the first without an objection. keep: the results of
    :meth:`Decision.compute` will be kept for a repetition with gradients; decide as for that repetition.

    Raises ValueError for a wrong argument, and NotImplementedError if no way of that name can compute the request.
    """
    q, k, v = _autocast(q, k, v)
    scale = arguments.get("scale")
    if isinstance(scale, Tensor) and isinstance(q, Tensor):
        # Multiplied into q, so that autograd computes the scale's gradient, whatever the way.
        expected = "a number, or a floating-point tensor that broadcasts to (batch, heads, queries, 1)"
        require(scale.is_floating_point(), "scale", expected, scale.dtype)
        canonical_broadcast(scale, (*q.shape[:-1], 1), "scale")
        q, arguments = (q * scale).to(q.dtype), {**arguments, "scale": 1.0}
    with torch.set_grad_enabled(keep or torch.is_grad_enabled()):
        request = build_request(q, k, v, **arguments)
    if q.device.type == "cpu":
        contention.watch()
    able: Way | None = None
    objection: str | None = None
    divided, transformed = active(), is_transformed()
    for way in _named(backend):
        if divided is not None and not isinstance(way, Tiled):
            objection = objection or "it cannot compute tiles of tokens that are divided over processes"
            continue
        against = _against(way, keep, transformed) or way.objection(request, q, k, v)
        if against is None:
            if divided is not None:
                return Decision(request, divided.way(way, request)), q, k, v
            if way.drawback(request) is None:
                return Decision(request, way), q, k, v
            able = able or way
        objection = objection or against
    if able is None:
        other = "naive" if transformed else "tiled"
        raise NotImplementedError(f"backend: {backend!r} cannot serve this call: {objection}; use {other!r} or 'auto'")
    return Decision(request, able), q, k, v


def _against(way: Way, keep: bool, transformed: bool) -> str | None:
    if way.by_autograd:
        return "it leaves nothing that could be kept for backward" if keep else None
    return "torch.func's transforms need a way that autograd differentiates" if transformed else None


def _named(backend: str) -> Sequence[Way]:
    if backend == "auto":
        return WAYS
    require(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", repr(backend))
    return [way for way in WAYS if backend in (way.backend, way.name)]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the arguments of PyTorch's attention: fp32 to its dtype; fp64 stays."""
    dtype = autocast_dtype(tensors[0].device) if all(isinstance(t, Tensor) for t in tensors) else None
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


class _Attention(torch.autograd.Function):
    """Runs a way's forward and backward.

    results: those of the forward pass, if they were kept. tensors: q, k, v and the request's.
    """

    @staticmethod
    def forward(ctx: Any, decision: Decision, results: Sequence[Tensor] | None, *tensors: Any) -> tuple[Tensor, Tensor]:
        q, k, v, *others = tensors
        if results is None:
            with full_precision(q.device):
                results = decision.way.forward(decision.request.with_tensors(*others), q, k, v)
        out, lse, *state = (result.detach() for result in results)
        ctx.decision, ctx.others = decision, len(others)
        ctx.save_for_backward(q, k, v, out, lse, *others, *state)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors  # read once: a checkpoint returns each tensor a single time
        request = ctx.decision.request.with_tensors(*rest[: ctx.others])
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        bias_gradient = BiasGradient(request.bias, ctx.needs_input_grad[7:], request.compute_dtype)
        given = BackwardInputs(q, k, v, out, lse, rest[ctx.others :], grad_out, grad_lse, bias_gradient)
        with full_precision(q.device), bias_gradient.held():
            found = ctx.decision.way.backward(request, given)
        of_heads = (gradient.to(x.dtype) for gradient, x in zip(found, (q, k, v), strict=True))
        return None, None, *of_heads, None, None, *bias_gradient.results
