"""What is done about a request: decided once, and the same in forward, its repetition and backward.

A :class:`Decision` is the request with the way of computing it. It holds no tensors once it is kept: autograd keeps
those, or whoever keeps the results of a forward pass on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import once_differentiable
from ..common.errors import require
from ..common.precision import full_precision
from . import cpu_kernel, kernel, naive, onednn, products, sdpa
from .bias import BiasGradient
from .request import AttentionRequest
from .tiles import Saved, Upstream
from .way import Way

WAYS: tuple[Way, ...] = (
    onednn.OneDnn(),
    sdpa.Sdpa(),
    kernel.Cpu(),
    kernel.Flash(),
    kernel.Efficient(),
    cpu_kernel.CpuKernel(),
    products.Products(),
    naive.Naive(),
)
"""Every way of computing attention, the preferred ones first."""

BACKENDS = ("naive", "tiled", "fused", "auto")
"""The kinds of ways that a caller may ask for, and ``"auto"`` for any; a way's own name is taken, too."""


@dataclass(frozen=True)
class Decision:
    """What was asked, and the way it is computed."""

    request: AttentionRequest
    way: Way

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output ``(b, h, n, e)`` and the log-sum-exp ``(b, h, n)``, which None stands for where it was not asked for.

        Differentiable once in q, k, v, the bias (a tensor or a module's parameters) and through the log-sum-exp.
        """
        if not self.way.by_autograd:
            return self._through_function(None, q, k, v)
        out, *lse = self.way.forward(self.request, q, k, v)
        return out, lse[0] if lse else None

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The results of :meth:`attend` without gradients, to be kept for :meth:`resume`; the output comes first."""
        with torch.no_grad(), full_precision(q.device):
            return self.way.forward(self.request, q, k, v)

    def resume(self, results: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of :meth:`attend` with its gradients, of ``results`` that :meth:`compute` gave for the same."""
        return self._through_function(results, q, k, v)[0]

    def without_tensors(self) -> Decision:
        """The decision alone, safe to keep."""
        return replace(self, request=self.request.with_tensors(None, None, None))

    def of_request(self, request: AttentionRequest) -> Decision:
        """The same decision about the same request, which has its tensors."""
        return replace(self, request=request)

    def _through_function(
        self, results: Sequence[Tensor] | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        bias = self.request.bias
        tensors = (*self.request.tensors, *(() if bias is None else bias.parameters))
        out, lse = _Attention.apply(self.without_tensors(), results, q, k, v, *tensors)
        return out, lse


def decide(request: AttentionRequest, backend: str, q: Tensor, k: Tensor, v: Tensor, *, keep: bool = False) -> Decision:
    """The first of the ways that ``backend`` names with nothing against it, else the first that can.

    keep: results are to be kept, by :meth:`Decision.compute`. Raises ValueError for an unknown backend, and
    NotImplementedError where no way of that name can compute the request.
    """
    able: Way | None = None
    objection: str | None = None
    for way in _named(backend):
        against = _objection(way, request, q, k, v, keep)
        if against is None:
            if way.drawback(request) is None:
                return Decision(request, way)
            able = able or way
        objection = objection or against
    if able is None:
        raise NotImplementedError(f"backend: {backend!r} cannot serve this call: {objection}; use 'tiled' or 'auto'")
    return Decision(request, able)


def ruled_out(decision: Decision, q: Tensor, k: Tensor, v: Tensor) -> dict[str, str]:
    """What speaks against the other kinds of ways, by kind, where any might have been chosen."""
    request, chosen = decision.request, decision.way
    return {
        way.backend: way.objection(request, q, k, v) or way.drawback(request) or chosen.merit
        for way in reversed(WAYS)
        if way.backend != chosen.backend
    }


def _named(backend: str) -> Sequence[Way]:
    if backend == "auto":
        return WAYS
    named = [way for way in WAYS if backend in (way.backend, way.name)]
    names = dict.fromkeys((*BACKENDS, *(way.name for way in WAYS)))
    require(bool(named), "backend", f"one of {', '.join(names)}", repr(backend))
    return named


def _objection(way: Way, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> str | None:
    if keep and way.by_autograd:
        return "it leaves nothing that could be kept for backward"
    return way.objection(request, q, k, v)


class _Attention(torch.autograd.Function):
    """A way's forward and backward. ``results``: those of the forward pass, where they were kept.

    tensors: q, k, v, mask, document numbers, bias, and a bias module's parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, decision: Decision, results: Sequence[Tensor] | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v, *others = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        if results is None:
            request = decision.request.with_tensors(*others[:3])
            with full_precision(q.device):
                results = decision.way.forward(request, q, k, v)
        out, lse, *state = (result.detach() for result in results)
        ctx.decision, ctx.inputs = decision, len(tensors)
        ctx.save_for_backward(*tensors, out, lse, *state)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: a checkpoint hands each out a single time
        tensors, (out, lse, *state) = saved[: ctx.inputs], saved[ctx.inputs :]
        q, k, v, mask, document_ids, bias, *_ = tensors
        request = ctx.decision.request.with_tensors(mask, document_ids, bias)
        saved = Saved(q, k, v, out, lse, state)
        upstream = Upstream(torch.zeros_like(out) if grad_out is None else grad_out, grad_lse)
        needed = ctx.needs_input_grad[8:] if bias is None else ctx.needs_input_grad[7:8]
        bias_gradient = BiasGradient(request.bias, needed, request.compute_dtype)
        with full_precision(q.device):
            found = ctx.decision.way.backward(request, saved, upstream, bias_gradient)
        of_heads = (gradient.to(x.dtype) for gradient, x in zip(found, (q, k, v), strict=True))
        of_bias = bias_gradient.results if bias is not None else [None, *bias_gradient.results]
        return None, None, *of_heads, None, None, *of_bias
