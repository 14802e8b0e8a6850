"""Validate one call's arguments once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.divided import Divided, active
from ..common.dry_run import device_type
from ..common.errors import require, require_positive_int, require_probability
from ..common.precision import COMPUTED, full_dtype
from ..torch_internals.tensors import are_plain, is_fake
from .bias import Bias, BiasModule
from .visibility import Block, Mask, Visibility, Window

LARGEST_BIAS, LARGEST_SCORE, LARGEST_VALUE = 2.0**12, 2.0**16, 2.0**96
"""Up to this bias and this score of a row a log-sum-exp in fp32 is accurate to 2.4e-4 and 4e-3, which is fp32's own
resolution of scores; up to this value products of values stay finite."""
ROUNDED_AWAY = 2.0**56
"""Biases beside which fp64 has no digits left for ordinary scores, which then count as equal."""
IMMODERATE = f"scores of q and k may exceed {LARGEST_SCORE:.0f}, or values be near the end of fp32"


@dataclass(frozen=True)
class AttentionRequest:
    """One call of :func:`dot_product_attention`, validated. Shapes by the legend of ``visibility``.

    device_type: of the device whose choices are made; in a dry run not ``device``'s own. moderate: q, k and v are so
    small that fp32 neither rounds away part of a log-sum-exp nor overflows. block: the heads, queries and keys
    that the given tensors hold, while the rest of the request describes the whole; None: all.
    """

    b: int
    h: int
    kv: int
    n: int
    m: int
    d: int
    e: int
    device: torch.device
    device_type: str
    dtype: torch.dtype
    scale: float
    visibility: Visibility
    bias: Bias | None
    dropout: float
    seed: int
    q_bucket_size: int
    k_bucket_size: int
    return_lse: bool
    moderate: bool
    block: Block | None = None

    @property
    def keeps_rest(self) -> bool:
        """Whether tiles keep for backward the part of the log-sum-exp that fp32 rounds away."""
        return self.bias is not None or not self.moderate

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of scores, softmax and accumulators: fp64 for fp64, fp32 for all others."""
        return full_dtype(self.dtype)

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        return self.b, self.h, self.n, self.m

    @property
    def held(self) -> Block:
        """The heads, queries and keys that the given tensors hold."""
        return self.block or Block(slice(0, self.h), slice(0, self.n), slice(0, self.m))

    @property
    def tile_scores(self) -> int:
        """The number of scores in a whole tile of one head."""
        return min(self.q_bucket_size, self.n) * min(self.k_bucket_size, self.m)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Mask, document numbers, and the bias's tensor or parameters."""
        leaves = () if self.bias is None else self.bias.leaves
        return self.visibility.mask, self.visibility.document_ids, *leaves

    def with_tensors(self, *tensors: Tensor | None) -> AttentionRequest:
        """Return the same request with these tensors, in the order of :attr:`tensors`, or without any."""
        mask, document_ids, *of_bias = tensors or (None, None)
        visibility = replace(self.visibility, mask=mask, document_ids=document_ids)
        bias = None if self.bias is None else self.bias.with_tensors(*of_bias)
        return replace(self, visibility=visibility, bias=bias)


def build_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    attn_bias: Tensor | BiasModule | None = None,
    causal: bool = False,
    window: Window | None = None,
    document_ids: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    q_bucket_size: int = 512,
    k_bucket_size: int = 1024,
    return_lse: bool = False,
) -> AttentionRequest:
    """Validate the arguments of :func:`dot_product_attention` and draw the dropout seed from the default generator."""
    b, h, kv, n, m, d, e = _dimensions(q, k, v)
    divided = active()
    if divided is not None:
        local = divided.local_tokens
        for name, tokens in (("q", n), ("k", m)):
            require(tokens == local, name, f"{local} tokens, each process's part of the sequence", tokens)
        n = m = divided.num_tokens
        mask = divided.gather(mask) if isinstance(mask, Tensor) and mask.shape == (b, local) else mask
        document_ids = None if document_ids is None else divided.gather(document_ids)
    require_positive_int("q_bucket_size", q_bucket_size)
    require_positive_int("k_bucket_size", k_bucket_size)
    require_probability("dropout", dropout)
    shape, scale = (b, h, n, m), float(d**-0.5 if scale is None else scale)
    bias = None if attn_bias is None else Bias.of(attn_bias, shape, q)
    return AttentionRequest(
        *(b, h, kv, n, m, d, e),
        device=q.device,
        device_type=device_type(q.device),
        dtype=v.dtype,
        scale=scale,
        visibility=Visibility.build(shape, q.device, mask, causal, window, document_ids),
        bias=bias,
        dropout=float(dropout),
        seed=_draw_seed(divided) if dropout else 0,
        q_bucket_size=q_bucket_size,
        k_bucket_size=k_bucket_size,
        return_lse=return_lse,
        moderate=_are_moderate(q, k, v, scale, divided),
    )


def _dimensions(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int, int]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require(isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__)
        require(tensor.dim() == 4, name, "shape (batch, heads, tokens, width)", tuple(tensor.shape))
        require(tensor.dtype in COMPUTED, name, "a floating-point dtype of 16 bits or more", tensor.dtype)
        require(tensor.dtype == q.dtype, name, f"dtype {q.dtype}, that of q", tensor.dtype)
        require(tensor.device == q.device, name, f"device {q.device}, that of q", tensor.device)
    b, h, n, d = q.shape
    kv, m, e = k.shape[1], k.shape[2], v.shape[3]
    require(k.shape[0] == b, "k", f"batch {b}, that of q", k.shape[0])
    require(k.shape[3] == d, "k", f"width {d}, that of q", k.shape[3])
    require(v.shape[:3] == k.shape[:3], "v", f"batch, heads and tokens of k, {tuple(k.shape[:3])}", tuple(v.shape[:3]))
    require(kv > 0 and h % kv == 0, "k", f"a head count that divides q's {h}", kv)
    require(d > 0, "q", "a width of at least 1", d)
    return b, h, kv, n, m, d, e


def _are_moderate(q: Tensor, k: Tensor, v: Tensor, scale: float, divided: Divided | None) -> bool:
    """Return True if q, k and v are small, or on a CPU presumed to be so where their values cannot be read.

    Checked only on CPUs, since elsewhere the host would wait.
    """
    if device_type(q.device) != "cpu":
        return False
    if torch.compiler.is_compiling() or not are_plain(q, k, v) or is_fake(q) or 0 in (*q.shape, *k.shape, *v.shape):
        return True
    q, k, v = (x.detach() for x in (q, k, v))

    def of_all(*values: Tensor) -> list[float]:
        found = torch.stack([value.to(full_dtype(q.dtype)) for value in values])
        return (found if divided is None else divided.largest(found)).tolist()

    # Two reductions take two fifths of aminmax()'s time where heads are strided, as after a projection or in a cache.
    q_largest, k_largest, v_largest = of_all(*(torch.maximum(x.amax(), -x.amin()) for x in (q, k, v)))
    if not (v_largest <= LARGEST_VALUE or math.isinf(v_largest)):
        return False
    # This bound needs no norms, which take longer, and nearly always decides.
    if q_largest * k_largest * q.shape[-1] * abs(scale) <= LARGEST_SCORE:
        return True
    q_norm, k_norm = of_all(*(torch.linalg.vector_norm(x, dim=-1, dtype=full_dtype(x.dtype)).amax() for x in (q, k)))
    return q_norm * k_norm * abs(scale) <= LARGEST_SCORE


def _draw_seed(divided: Divided | None) -> int:
    seed = torch.randint(2**62, (), device="cpu")
    if is_fake(seed):
        return 0
    return int(seed) if divided is None else divided.same(int(seed))
