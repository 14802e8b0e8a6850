"""Which weights are so small beside their row's others, because of a bias, that they need not be computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..torch_internals.tensors import are_plain, is_fake
from .request import AttentionRequest

# With a bias, weights below 2**-100 of their row's sum may count as 0: beside the largest value that is far below the
# rounding of fp32 and fp64, and some CPUs multiply the denormal ones among them slowly.
NEGLIGIBLE = -100 * math.log(2)


def largest_products(request: AttentionRequest, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what no scaled product of each query with a key exceeds, ``(b, h, n)``: by Cauchy and Schwarz, rounded up.

    Keys that causality hides from a query do not count, so that the future stays invisible bit for bit. None where it
    is not needed or not known: without a bias, and where the host would wait for values or has none.
    """
    if request.bias is None or request.device_type != "cpu" or not are_plain(q, k) or is_fake(q) or not k.numel():
        return None
    of_queries, reach = (torch.linalg.vector_norm(x, dim=-1, dtype=request.compute_dtype) for x in (q, k))
    seen, queries, first_key = request.visibility, request.held.queries, request.held.keys.start
    if seen.right is None:
        reach = reach.amax(dim=-1, keepdim=True)
    else:
        last = torch.arange(queries.start, queries.stop, device=k.device) + (seen.offset + seen.right - first_key)
        reach = reach.cummax(dim=-1).values[..., last.clamp(0, k.shape[2] - 1)]
    reach = reach.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    # More than rounding, so that what is left out by this bound is certainly hidden by the scores themselves.
    bounds: Tensor = of_queries * reach * (1.01 * abs(request.scale)) + 1.0
    return bounds
