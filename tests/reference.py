"""Plain definitions that every path of the library is held to, written without it: nothing here imports the package.

Letters: b batch, h query heads, g key/value heads, n queries, m keys, d head width, e value width.
Everything is computed in the dtype of the inputs and left to autograd, so the same function is the truth (given fp64
copies) and the yardstick of what a straightforward implementation loses in a lower precision.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Bias = Tensor | Callable[[Tensor, Tensor], Tensor]
EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def visible(
    b: int,
    h: int,
    n: int,
    m: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Which key each query may attend to, bool (b, h, n, m). Query i stands at key position i + m - n."""
    position = torch.arange(n)[:, None] + (m - n)
    key = torch.arange(m)[None, :]
    seen = torch.ones(b, h, n, m, dtype=torch.bool)
    if mask is not None:
        seen = seen & (mask[:, None, None, :] if mask.ndim == 2 else mask)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        seen = seen & (key >= position - left) & (key <= position + right)
    if document_ids is not None:
        seen = seen & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return seen


def scores_and_visibility(
    q: Tensor, k: Tensor, *, attn_bias: Bias | None = None, scale: float | None = None, **what_is_seen
) -> tuple[Tensor, Tensor]:
    """Scaled scores plus bias, (b, h, n, m), and which of them count; a bias of -inf hides a key too."""
    (b, h, n, d), m = q.shape, k.shape[2]
    k = k.repeat_interleave(h // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (d**-0.5 if scale is None else scale)
    if attn_bias is not None:
        bias = attn_bias if isinstance(attn_bias, Tensor) else attn_bias(torch.arange(n) + m - n, torch.arange(m))
        scores = scores + bias.to(scores.dtype)
    seen = visible(b, h, n, m, **what_is_seen) & (scores.detach() != -math.inf)
    return scores, seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float = 0.0,
    keep: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """softmax(q k^T scale + bias) v over what is visible, (b, h, n, e); rows that see nothing are 0.

    `keep` (b, h, n, m) bool says which probabilities a dropout of rate `dropout` kept; these are scaled by 1/(1-p).
    """
    scores, seen = scores_and_visibility(q, k, **kwargs)
    # A row of nothing but -inf would be 0/0: such rows go through softmax with zeros and are erased after it.
    hidden_row = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(hidden_row, 0.0)
    probabilities = scores.softmax(-1).masked_fill(~seen, 0.0)
    if keep is not None:
        probabilities = probabilities * keep / (1.0 - dropout)
    return probabilities @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def log_sum_exp(q: Tensor, k: Tensor, **kwargs) -> Tensor:
    """log of the softmax's denominator, (b, h, n); -inf where a row sees nothing."""
    scores, seen = scores_and_visibility(q, k, **kwargs)
    return scores.masked_fill(~seen, -math.inf).logsumexp(-1)


def alibi(heads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """ALiBi for a power-of-two number of heads: -2^(-8(h+1)/heads) |i - j|."""
    slopes = torch.tensor([2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)], dtype=torch.float64)
    return lambda i, j: -slopes[:, None, None] * (i[:, None] - j[None, :]).abs()


def t5_bucket(offset: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """The bucket of one key-minus-query offset, as in T5: half of the buckets exact, half logarithmic."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket = num_buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    logarithmic = math.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return bucket + min(exact + int(logarithmic), num_buckets - 1)


# The whole network, from a dictionary of weights under upstream's names.


def upstream_state_dict(
    *, num_tokens, max_seq_len, dim, depth, heads, dim_head, ff_mult=4, duplicated=True, dtype=torch.float32
) -> dict[str, Tensor]:
    """Random weights under the keys that the upstream package saves, every layer tensor twice if `duplicated`."""

    def normal(*shape, std):
        return torch.randn(*shape, dtype=dtype) * std

    def norm(name):
        return {f"{name}.weight": 1 + normal(dim, std=0.1), f"{name}.bias": normal(dim, std=0.1)}

    inner, hidden = heads * dim_head, dim * ff_mult
    state = {
        "token_emb.weight": normal(num_tokens, dim, std=1.0),
        "pos_emb.weight": normal(max_seq_len, dim, std=0.5),
        **norm("to_logits.0"),
        "to_logits.1.weight": normal(num_tokens, dim, std=dim**-0.5),
        "to_logits.1.bias": normal(num_tokens, std=0.1),
    }
    for i in range(depth):
        f = {
            "fn.to_q.weight": normal(inner, dim, std=1.5 * dim**-0.5),
            "fn.to_kv.weight": normal(2 * inner, dim, std=1.5 * dim**-0.5),
            "fn.to_out.weight": normal(dim, inner, std=inner**-0.5),
            **norm("norm"),
        }
        g = {
            "fn.net.0.weight": normal(hidden, dim, std=dim**-0.5),
            "fn.net.0.bias": normal(hidden, std=0.1),
            "fn.net.2.weight": normal(dim, hidden, std=hidden**-0.5),
            "fn.net.2.bias": normal(dim, std=0.1),
            **norm("norm"),
        }
        for index, letter, tensors in ((0, "f", f), (1, "g", g)):
            for name, tensor in tensors.items():
                state[f"layers.{i}.{index}.{name}"] = tensor
                if duplicated:
                    state[f"net.blocks.{i}.{letter}.net.{name}"] = tensor
    return state


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_layer(
    x: Tensor, to_q: Tensor, to_kv: Tensor, to_out: Tensor, *, heads, context=None, kv_heads=None, **kw
):
    """Projections, attention, output projection: (b, n, dim) -> (b, n, dim). Keys come first in `to_kv`."""
    keys, values = F.linear(x if context is None else context, to_kv).chunk(2, dim=-1)
    kv_heads = kv_heads or heads
    out = attention(
        split_heads(F.linear(x, to_q), heads), split_heads(keys, kv_heads), split_heads(values, kv_heads), **kw
    )
    return F.linear(out.transpose(1, 2).flatten(2), to_out)


def cosine_attention_layer(x, to_q, to_kv, to_out, log_scale, *, heads, **kwargs):
    """The same with l2-normalised queries and keys and a learned log-scale (1, h, 1, 1) per head."""
    keys, values = F.linear(x, to_kv).chunk(2, dim=-1)
    q, k = (F.normalize(split_heads(t, heads), dim=-1) for t in (F.linear(x, to_q), keys))
    out = attention(q * log_scale.exp(), k, split_heads(values, heads), scale=1.0, **kwargs)
    return F.linear(out.transpose(1, 2).flatten(2), to_out)


def positions_of(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Positions (b, n), counted from the first unmasked token of each row."""
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    return position if mask is None else (position - mask.int().argmax(-1, keepdim=True)).clamp(min=0)


def transformer(weights: Mapping[str, Tensor], tokens: Tensor, *, heads: int, mask=None, **attention_kwargs) -> Tensor:
    """Logits (b, n, num_tokens): two streams, y1 = x1 + f(x2), y2 = x2 + g(y1), summed, normed, projected."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def f(x, i):
        projections = (weights[f"layers.{i}.0.fn.{name}.weight"] for name in ("to_q", "to_kv", "to_out"))
        return attention_layer(norm(x, f"layers.{i}.0.norm"), *projections, heads=heads, mask=mask, **attention_kwargs)

    def g(x, i):
        w = {name: weights[f"layers.{i}.1.fn.net.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
        hidden = F.gelu(F.linear(norm(x, f"layers.{i}.1.norm"), w["0.weight"], w["0.bias"]))
        return F.linear(hidden, w["2.weight"], w["2.bias"])

    x1 = x2 = weights["token_emb.weight"][tokens] + weights["pos_emb.weight"][positions_of(tokens, mask)]
    for i in range(depth):
        x1 = x1 + f(x2, i)
        x2 = x2 + g(x1, i)
    return F.linear(norm(x1 + x2, "to_logits.0"), weights["to_logits.1.weight"], weights["to_logits.1.bias"])


def transformer_loss(weights: Mapping[str, Tensor], tokens: Tensor, labels: Tensor, **kwargs) -> Tensor:
    """Mean cross-entropy over the positions whose label is not -100."""
    return F.cross_entropy(transformer(weights, tokens, **kwargs).flatten(0, 1), labels.flatten(), ignore_index=-100)


# Comparison.


def assert_as_accurate(what: str, fast: Tensor, naive: Tensor, truth: Tensor, *, slack: float = 1.0) -> None:
    """The fast path may lose no more against the fp64 truth than the naive path of the same dtype, plus an epsilon."""
    assert fast.shape == truth.shape, f"{what}: shape {tuple(fast.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(fast).all(), f"{what}: not finite"
    if not truth.numel():
        return
    error = (fast.double() - truth).abs().max().item()
    naive_error = (naive.double() - truth).abs().max().item()
    budget = naive_error + slack * EPSILON[naive.dtype] * max(1.0, truth.abs().max().item())
    assert error <= budget, f"{what}: error {error:.2e} against fp64, naive {naive_error:.2e}, allowed {budget:.2e}"


def assert_close(what: str, ours: Tensor, truth: Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest true value (or to 1, for small ones)."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return
    error = ((ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1.0)).item()
    assert error <= tolerance, f"{what}: off by {error:.2e}, allowed {tolerance:.1e}"
