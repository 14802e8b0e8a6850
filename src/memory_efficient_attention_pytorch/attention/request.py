"""What is asked of attention: every argument checked once, and cut into independent parts and tiles."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..common.dry_run import num_threads
from ..common.errors import require, require_positive_int, require_probability
from ..common.products import onednn_is_usable
from .visibility import Tile, Visibility, canonical_broadcast, narrow_broadcast, slice_broadcast

BiasModule = Callable[..., Tensor]

# Scores alive at once in one tile of plain matrix products: 4 MiB of fp32 stay in a CPU's cache, a GPU wants more work.
TILE_ELEMENTS = {"cpu": 2**20}
TILE_ELEMENTS_ELSEWHERE = 2**25
# Tiles by oneDNN, one head at a time: the scores and the width below which calling its operators costs more than they
# gain, and the CPU's threads above which one tile is too little for all of them.
LEAST_ONEDNN_SCORES, LEAST_ONEDNN_WIDTH, MOST_ONEDNN_THREADS = 2**18, 32, 4


class Part(NamedTuple):
    """A slice of the batch and of the query heads, and the slice of key/value heads that serves them."""

    batch: slice
    heads: slice
    kv_heads: slice

    def of_query(self, x: Tensor) -> Tensor:
        """The single query head that this part is, of ``x (b, h, …)``."""
        return x[self.batch, self.heads][0, 0]

    def of_key(self, x: Tensor) -> Tensor:
        """The key/value head that serves the single query head, of ``x (b, kv, …)``."""
        return x[self.batch, self.kv_heads][0, 0]


@dataclass(frozen=True)
class AttentionRequest:
    """One call of :func:`dot_product_attention`, validated. Shapes by the legend of ``visibility``."""

    b: int
    h: int
    kv: int
    n: int
    m: int
    d: int
    e: int
    device: torch.device
    dtype: torch.dtype
    scale: float
    visibility: Visibility
    bias: Tensor | BiasModule | None = None
    bias_needs_grad: bool = False
    dropout: float = 0.0
    seed: int = 0
    q_bucket_size: int = 512
    k_bucket_size: int = 1024
    return_lse: bool = False
    onednn: bool = False
    """Tiles are those of ``onednn_tiles``, one head at a time."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Scores, softmax and accumulators: fp64 for fp64, fp32 for everything else."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def score_shape(self) -> tuple[int, int, int, int]:
        return self.b, self.h, self.n, self.m

    def parts(self, elements: int | None = None) -> Iterator[Part]:
        """Cut batch and heads so that one tile of scores holds at most ``elements`` (at least one head).

        A part's heads are whole groups sharing key/value heads, or a piece of a single group.
        """
        if elements is None:
            elements = TILE_ELEMENTS.get(self.device.type, TILE_ELEMENTS_ELSEWHERE)
            elements = 1 if self.onednn else elements
        tile = min(self.q_bucket_size, self.n) * min(self.k_bucket_size, self.m)
        per_part = max(1, elements // max(1, tile))
        heads = _part_of_heads(self.h, self.h // self.kv, per_part)
        batch = max(1, per_part // self.h) if heads == self.h else 1
        group = self.h // self.kv
        for b0 in range(0, self.b, batch):
            for h0 in range(0, self.h, heads):
                kv = slice(h0 // group, max(h0 // group + 1, (h0 + heads) // group))
                yield Part(slice(b0, min(b0 + batch, self.b)), slice(h0, h0 + heads), kv)

    def bias_tile(self, tile: Tile, part: Part) -> Tensor | None:
        """The bias of one tile, broadcastable to the part's ``(b, h, i, j)``; None without a bias."""
        if self.bias is None:
            return None
        if isinstance(self.bias, Tensor):
            return slice_broadcast(narrow_broadcast(self.bias, part.batch, part.heads), tile.queries, tile.keys)
        offset = self.visibility.offset
        queries = torch.arange(tile.i0 + offset, tile.i1 + offset, device=self.device)
        keys = torch.arange(tile.j0, tile.j1, device=self.device)
        if accepts_heads(self.bias):
            values = self.bias(queries, keys, heads=part.heads)
            return values[(None,) * (4 - values.dim())]
        shape = (self.b, self.h, tile.i1 - tile.i0, tile.j1 - tile.j0)
        values = canonical_broadcast(self.bias(queries, keys), shape, "attn_bias module's output")
        return narrow_broadcast(values, part.batch, part.heads)

    def keep_tile(self, tile: Tile, part: Part) -> Tensor | None:
        """Bool tensor of the part's ``(b, h, i, j)``: which probabilities survive dropout; None without dropout.

        Depends on seed, place and tile alone, so it comes out the same in any order and again in backward. On a CPU
        each head has its own draw, since there the cut into parts follows the number of threads.
        """
        if not self.dropout:
            return None
        size = (part.batch.stop - part.batch.start, part.heads.stop - part.heads.start)
        shape = (*size, tile.i1 - tile.i0, tile.j1 - tile.j0)
        keep = torch.empty(shape, dtype=torch.bool, device=self.device)
        generator = torch.Generator(self.device)
        each = [(b, h) for b in range(size[0]) for h in range(size[1])] if self.device.type == "cpu" else [(0, 0)]
        for b, h in each:
            place = (part.batch.start + b, part.heads.start + h, tile.i0, tile.j0)
            generator.manual_seed(_mix(self.seed, *place))
            (keep if len(each) == 1 else keep[b, h]).bernoulli_(1 - self.dropout, generator=generator)
        return keep

    @property
    def bias_parameters(self) -> tuple[Tensor, ...]:
        """The bias module's parameters (none for a tensor or a plain function)."""
        parameters = getattr(self.bias, "parameters", None)
        return () if isinstance(self.bias, Tensor) or parameters is None else tuple(parameters())

    def without_tensors(self) -> AttentionRequest:
        """Safe to keep on an autograd ctx: tensors are kept by ``save_for_backward`` alone."""
        return self.with_tensors(None, None, None)

    def with_tensors(self, mask: Tensor | None, document_ids: Tensor | None, bias: Tensor | None) -> AttentionRequest:
        module = None if isinstance(self.bias, Tensor) else self.bias
        visibility = self.visibility.with_tensors(mask, document_ids)
        return replace(self, visibility=visibility, bias=module if bias is None else bias)


def build_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    attn_bias: Tensor | BiasModule | None,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
    document_ids: Tensor | None,
    dropout: float,
    scale: float | None,
    q_bucket_size: int,
    k_bucket_size: int,
    return_lse: bool,
) -> AttentionRequest:
    """Validate the arguments of :func:`dot_product_attention` and draw the dropout seed from the default generator."""
    b, h, kv, n, m, d, e = _dimensions(q, k, v)
    require_positive_int("q_bucket_size", q_bucket_size)
    require_positive_int("k_bucket_size", k_bucket_size)
    require_probability("dropout", dropout)
    visibility = Visibility.build((b, h, n, m), q.device, mask, causal, window, document_ids)
    bias, needs_grad = _check_bias(attn_bias, (b, h, n, m), q)
    request = AttentionRequest(
        *(b, h, kv, n, m, d, e),
        device=q.device,
        dtype=v.dtype,
        scale=float(d**-0.5 if scale is None else scale),
        visibility=visibility,
        bias=bias,
        bias_needs_grad=needs_grad,
        dropout=float(dropout),
        seed=_draw_seed() if dropout else 0,
        q_bucket_size=q_bucket_size,
        k_bucket_size=k_bucket_size,
        return_lse=return_lse,
        onednn=_onednn_tiles_are_faster(min(q_bucket_size, n) * min(k_bucket_size, m), q, k, v),
    )
    return request


def _onednn_tiles_are_faster(scores: int, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Are tiles of so many scores possible and faster by oneDNN? Asked once, so that backward does as forward did."""
    if scores < LEAST_ONEDNN_SCORES or min(q.shape[-1], v.shape[-1]) < LEAST_ONEDNN_WIDTH:
        return False
    # Tensors of other types bring their own operators with them; functorch has rules for PyTorch's.
    plain = all(type(t) in (Tensor, nn.Parameter, FakeTensor) for t in (q, k, v))
    if not plain or torch._C._are_functorch_transforms_active() or q.dtype == torch.float64:
        return False
    return num_threads() <= MOST_ONEDNN_THREADS and onednn_is_usable(q.device)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: what runs inside chooses its own dtypes."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def accepts_heads(bias: BiasModule) -> bool:
    """Can the module evaluate some of the heads alone (a ``heads`` keyword taking a slice)?"""
    call = getattr(bias, "forward", bias)
    return "heads" in inspect.signature(call).parameters


def _dimensions(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int, int]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require(isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__)
        require(tensor.dim() == 4, name, "shape (batch, heads, tokens, width)", tuple(tensor.shape))
        require(tensor.is_floating_point(), name, "a floating-point dtype", tensor.dtype)
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


def _check_bias(
    bias: Tensor | BiasModule | None, shape: tuple[int, int, int, int], q: Tensor
) -> tuple[Tensor | BiasModule | None, bool]:
    if bias is None:
        return None, False
    if isinstance(bias, Tensor):
        require(bias.is_floating_point(), "attn_bias", "a floating-point dtype (a bool mask goes to mask)", bias.dtype)
        require(bias.device == q.device, "attn_bias", f"device {q.device}, that of q", bias.device)
        return canonical_broadcast(bias, shape, "attn_bias"), bias.requires_grad and torch.is_grad_enabled()
    expected = "a tensor or a module called with query and key positions"
    require(callable(bias), "attn_bias", expected, type(bias).__name__)
    needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in getattr(bias, "parameters", tuple)())
    if torch.is_grad_enabled() and not needs_grad:
        position = torch.zeros(1, dtype=torch.long, device=q.device)
        captured = bias(position, position).requires_grad
        require(
            not captured, "attn_bias", "a module that holds what needs a gradient as parameters", "a captured tensor"
        )
    return bias, needs_grad


def _part_of_heads(h: int, group: int, limit: int) -> int:
    """The largest divisor of h up to ``limit`` that is a multiple or a divisor of ``group``."""
    fitting = (s for s in range(1, min(h, limit) + 1) if h % s == 0 and (s % group == 0 or group % s == 0))
    return max(fitting, default=1)


def _draw_seed() -> int:
    seed = torch.randint(2**62, ())
    return 0 if isinstance(seed, FakeTensor) else int(seed)


def _mix(*values: int) -> int:
    """A 63-bit hash of integers (the finalizer of SplitMix64, Steele et al. 2014, chained)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1
