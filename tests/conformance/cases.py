"""The cases that every backend is held to, their inputs, and how one is run and compared."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from tests import reference

BACKENDS = ("naive", "tiled", "fused", "auto")
# The ways that a small question would not get by itself, by name.
PATHS = (*BACKENDS, "onednn", "products")


class LearnedBias(nn.Module):
    """A bias module from outside the library: per head, a learned wave of the query's and the key's own positions.

    Not a function of the distance alone, so that a tile evaluated at wrong absolute positions shows.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, 2))

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        # At least fp32 inside, whatever the parameter's dtype: the module's own rounding is not what is tested.
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        i = torch.sin(0.3 * query_positions.to(weight.dtype))[:, None]
        j = torch.cos(0.2 * key_positions.to(weight.dtype))[None, :]
        return weight[:, 0, None, None] * i * j + weight[:, 1, None, None] * (i - j)


@dataclass(frozen=True)
class Case:
    """One question to a backend. `bias`: a shape in letters ("1h1m") or "module". `e`, `kv`, `m` default to d, h, n."""

    name: str
    n: int = 7
    m: int | None = None
    b: int = 2
    h: int = 2
    kv: int | None = None
    d: int = 8
    e: int | None = None
    mask: str | None = None
    causal: bool = False
    window: int | tuple[int, int] | None = None
    documents: bool = False
    bias: str | None = None
    bias_grad: bool = True
    dropout: float = 0.0
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    buckets: tuple[int, int] = (4, 3)
    layout: str = "contiguous"
    magnitude: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def keys(self) -> int:
        return self.n if self.m is None else self.m

    @property
    def kv_heads(self) -> int:
        return self.kv or self.h


@dataclass
class Inputs:
    """Leaves to differentiate (q, k, v, a tensor bias), the rest of the arguments, and the cotangent."""

    leaves: dict[str, Tensor]
    module: nn.Module | None
    fixed: dict
    cotangent: Tensor

    def differentiated(self) -> dict[str, Tensor]:
        wanted = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        if self.module is not None:
            wanted |= {f"bias.{name}": p for name, p in self.module.named_parameters() if p.requires_grad}
        return wanted

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype, as separate leaves."""
        leaves = {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in self.leaves.items()}
        module = None if self.module is None else copy.deepcopy(self.module).to(dtype)
        return replace(self, leaves=leaves, module=module, cotangent=self.cotangent.to(dtype))


def make_mask(case: Case) -> Tensor | None:
    b, h, n, m = case.b, case.h, case.n, case.keys
    first = torch.arange(m) < max(1, m // 3)
    masks = {
        "right padding": lambda: torch.stack([torch.arange(m) < max(1, m - 3 * row) for row in range(b)]),
        "left padding": lambda: torch.stack([torch.arange(m) >= min(m - 1, 3 * row) for row in range(b)]),
        "one row all hidden": lambda: torch.stack([first if row else torch.zeros_like(first) for row in range(b)]),
        "everything hidden": lambda: torch.zeros(b, m, dtype=torch.bool),
        "1hnm": lambda: torch.rand(1, h, n, m) > 0.4,
        "bhnm": lambda: torch.rand(b, h, n, m) > 0.4,
        "11nm": lambda: torch.rand(1, 1, n, m) > 0.4,
        "b11m": lambda: torch.rand(b, 1, 1, m) > 0.4,
        "b1n1": lambda: torch.rand(b, 1, n, 1) > 0.4,
        "hnm": lambda: torch.rand(h, n, m) > 0.4,
        "sparse bhnm": lambda: torch.rand(b, h, n, m) > 0.9,
    }
    return masks[case.mask]() if case.mask else None


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "transposed":  # as a projection of (b, n, h*d) arrives
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t


def make_inputs(case: Case) -> Inputs:
    torch.manual_seed(sum(map(ord, case.name)))
    b, h, kv, n, m, d = case.b, case.h, case.kv_heads, case.n, case.keys, case.d
    e = case.e or d
    shapes = {"q": (b, h, n, d), "k": (b, kv, m, d), "v": (b, kv, m, e)}
    size = {"q": case.magnitude, "k": case.magnitude, "v": 1.0}
    leaves = {
        name: laid_out((torch.randn(shape) * size[name]).to(case.dtype), case.layout).detach().requires_grad_()
        for name, shape in shapes.items()
    }
    module = None
    if case.bias == "module":
        module = LearnedBias(h).to(case.dtype)
    elif case.bias is not None:
        letters = {"b": b, "h": h, "n": n, "m": m, "1": 1}
        bias = torch.randn([letters[letter] for letter in case.bias]).to(case.dtype)
        leaves["bias"] = bias.requires_grad_(case.bias_grad)
    document_ids = torch.randint(0, 3, (b, n)).sort(-1).values if case.documents else None
    fixed = {
        "mask": make_mask(case),
        "causal": case.causal,
        "window": case.window,
        "document_ids": document_ids,
        "scale": case.scale,
        "dropout": case.dropout,
    }
    return Inputs(leaves, module, fixed, torch.randn(b, h, n, e).to(case.dtype))


def differentiate(inputs: Inputs, out: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, by name; a leaf that nothing depends on has gradient 0."""
    wanted = inputs.differentiated()
    grads = torch.autograd.grad(out, list(wanted.values()), inputs.cotangent.to(out.dtype), allow_unused=True)
    filled = (torch.zeros_like(leaf) if g is None else g for leaf, g in zip(wanted.values(), grads, strict=True))
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(wanted, filled, strict=True)}}


def bias_of(inputs: Inputs):
    return inputs.module if inputs.module is not None else inputs.leaves.get("bias")


def by_reference(inputs: Inputs, keep: Tensor | None = None) -> dict[str, Tensor]:
    q, k, v = (inputs.leaves[name] for name in "qkv")
    return differentiate(inputs, reference.attention(q, k, v, attn_bias=bias_of(inputs), keep=keep, **inputs.fixed))


def call(inputs: Inputs, backend: str, buckets: tuple[int, int], **overrides):
    """dot_product_attention on these inputs, from a fixed seed."""
    from memory_efficient_attention_pytorch import dot_product_attention

    q, k, v = (inputs.leaves[name] for name in "qkv")
    kwargs = inputs.fixed | {"attn_bias": bias_of(inputs)} | overrides
    v = kwargs.pop("v", v)
    torch.manual_seed(1234)
    sizes = {"q_bucket_size": buckets[0], "k_bucket_size": buckets[1]}
    return dot_product_attention(q, k, v, backend=backend, **sizes, **kwargs)


def keep_mask(inputs: Inputs, backend: str, buckets: tuple[int, int]) -> Tensor | None:
    """What dropout keeps under the fixed seed: attention over one-hot values returns the dropped probabilities."""
    if not inputs.fixed["dropout"]:
        return None
    v = inputs.leaves["v"]
    one_hot = torch.eye(v.shape[2], dtype=v.dtype).expand(*v.shape[:3], v.shape[2])
    return call(inputs, backend, buckets, v=one_hot).detach() != 0


def serve_or_skip(backend: str, function):
    """Run; "fused" may decline what no fused kernel computes, "onednn" fp64, in words that name them. No other may."""
    try:
        return function()
    except (NotImplementedError, ValueError) as refusal:
        if backend not in ("fused", "onednn") or backend not in str(refusal):
            raise
        pytest.skip(f"{backend} declines: {refusal}")


def result_or_message(function):
    """What it returns, or the message of the RuntimeError that it raises."""
    try:
        return function()
    except RuntimeError as error:
        return str(error)
