"""One of several processes that share each sequence over gloo.

Run as `python -m tests.distributed.divided_processes RANK WORLD DIRECTORY`.

Every case's loss and summed gradients go to DIRECTORY/WORLD-RANK.safetensors; the test computes them in one process.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memory_efficient_attention_pytorch import AutoregressiveWrapper, KVCache, Transformer, dot_product_attention
from memory_efficient_attention_pytorch.attention.mask_function import MaskFunction
from memory_efficient_attention_pytorch.benchmarking.measure import zero_grads
from memory_efficient_attention_pytorch.distributed import ContextParallel, all_to_all, ring
from memory_efficient_attention_pytorch.layers.positions import RelativePositionBias
from tests.memory.live_bytes import LiveBytes
from tests.processes import join, leave

BATCH, TOKENS, HEADS = 2, 61, 4
SIDES: dict[str, Any] = {"q_bucket_size": 8, "k_bucket_size": 8}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padding() -> Tensor:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[0, :9], mask[1, 50:] = False, False
    return mask


def documents() -> Tensor:
    return (torch.arange(TOKENS) // 17).expand(BATCH, -1).contiguous()


def near_or_even(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return ((query - key).abs() < 5 + head) | (key % 3 == 0)


class Score(nn.Module):
    """A function of the score that knows its places and has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, TOKENS, dtype=torch.float64))

    def forward(self, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score) + self.weight[query] * self.weight[key] * head


torch.manual_seed(0)  # the bias module is the same everywhere
# What may be seen or added, of which padding and documents are sharded with the tokens.
SEEN: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "causal, one sequence": {"causal": True},
    "window": {"window": (5, 9)},
    "causal window": {"causal": True, "window": 7},
    "padding": {"mask": padding()},
    "causal documents": {"causal": True, "document_ids": documents()},
    "function": {"mask": MaskFunction(near_or_even)},
    "whole mask": {"mask": numbers(1, HEADS, TOKENS, TOKENS, seed=5) > 0},
    "bias": {"causal": True, "attn_bias": numbers(HEADS, TOKENS, TOKENS, seed=6)},
    "bias module": {"attn_bias": RelativePositionBias(HEADS, 8, 20).double()},
    "score function": {"causal": True, "attn_bias": Score()},
    "large": {"causal": True},
    "dropout": {"causal": True, "dropout": 0.4},
    "dropout window": {"window": (11, 3), "dropout": 0.4},
}
# With fewer key/value heads, and in fp32: what depends on the head, on magnitudes, and one of each other kind.
GROUPED = ("all", "causal documents", "function", "whole mask", "bias", "score function", "dropout")
IN_FP32 = ("causal", "padding", "bias", "large", "dropout window")
NETWORKS: dict[str, dict[str, Any]] = {
    "learned": {"positions": "learned"},
    "learned, one sequence": {"positions": "learned"},
    "rotary exact": {"positions": "rotary", "exact": True},
    "rotary exact stored": {"positions": "rotary", "exact": True, "reversible": False},
    "alibi pieces": {"positions": "alibi", "head_chunks": 2, "ff_chunks": 3},
    "kept stored": {"keep_attention": True, "kv_heads": 2},
    "stored dropout": {"reversible": False, "dropout": 0.2},
    "kept pieces dropout": {"keep_attention": True, "head_chunks": 2, "dropout": 0.2, "tie_embeddings": True},
}


def sequences(name: str) -> int:
    return 1 if name.endswith("one sequence") else BATCH


def attended(seen: str, method: str, context: ContextParallel | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of one attention; ``method`` ending in ``gqa`` has half as many key/value heads."""
    given = dict(SEEN[seen])
    kv = 2 if method.endswith("gqa") else HEADS
    batch = sequences(seen)
    leaves = [numbers(batch, h, TOKENS, 8, seed=i, dtype=dtype) for i, h in enumerate((HEADS, kv, kv))]
    if seen == "large":
        # Only products of one process's query with keys of another are so large that fp32 rounds their log-sum-exp.
        leaves[0][:, :, -1], leaves[1][:, :, 20:22] = 2000.0, 100.0
    cotangent = numbers(batch, HEADS, TOKENS, 8, seed=9, dtype=dtype)
    bias = given.get("attn_bias")
    if isinstance(bias, Tensor):
        bias = given["attn_bias"] = bias.to(dtype).clone().requires_grad_()
    elif bias is not None:
        bias.zero_grad()
    torch.manual_seed(3)
    if context is None:
        q, k, v = (x.requires_grad_() for x in leaves)
        out = dot_product_attention(q, k, v, backend="tiled", **given, **SIDES)
        out.backward(cotangent)
        found = [out, q.grad, k.grad, v.grad]
    else:
        whole = [x.transpose(1, 2) for x in (*leaves, cotangent)]
        extra = [given.get(name) for name in ("mask", "document_ids")]
        sharded = [None if isinstance(x, Tensor) and x.shape != (BATCH, TOKENS) else x for x in extra]
        *own, of_mask, of_documents = context.shard(whole[0], None, *whole[1:], *sharded)
        q, k, v, cotangent = (x.transpose(1, 2) for x in own if x is not None)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        given |= {} if of_mask is None else {"mask": of_mask}
        given |= {} if of_documents is None else {"document_ids": of_documents}
        with context:
            out = dot_product_attention(q, k, v, **given, **SIDES)
        out.backward(cotangent)
        context.reduce_gradients([] if bias is None else [bias] if isinstance(bias, Tensor) else bias.parameters())
        found = [context.gather(x, 2) for x in (out, q.grad, k.grad, v.grad)]
    names = dict(zip(("out", "q", "k", "v"), found, strict=True))
    if bias is not None:
        names["bias"] = bias.grad if isinstance(bias, Tensor) else bias.weight.grad
    return {name: t.detach().clone().contiguous() for name, t in names.items()}


def network(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"num_tokens": 19, "max_seq_len": 64, "dim": 16, "depth": 2, "heads": HEADS, "dim_head": 4, "ff_mult": 2}
    return Transformer(**kwargs, causal=True, loss_chunk_size=8, **SIDES, **NETWORKS[name]).to(dtype)


def trained(name: str, context: ContextParallel | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss and the gradients of a Transformer; only the first 14 tokens have labels, so others have none."""
    model = network(name, dtype)
    if context is not None and name == "learned":
        model.compile(backend="eager")  # runs eagerly where tokens are divided
    tokens = torch.randint(19, (sequences(name), TOKENS), generator=torch.Generator().manual_seed(1))
    labels, mask = tokens.roll(-1, 1), padding()[: len(tokens)]
    labels[:, 14:] = -100
    torch.manual_seed(3)
    if context is None:
        loss = model(tokens, labels=labels, mask=mask)
        loss.backward()
    else:
        tokens, labels, mask = context.shard(tokens, labels, mask)
        with context:
            loss = model(tokens, labels=labels, mask=mask)
        loss.backward()
        context.reduce_gradients(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().reshape(1), **grads}


TOKENS_COUNTED = 2048
SIDES_COUNTED: dict[str, Any] = {"q_bucket_size": 128, "k_bucket_size": 128}


def peak(context: ContextParallel | None) -> int:
    """Bytes alive at the peak of a step of a Transformer that stores everything, beyond its gradients."""
    torch.manual_seed(0)
    kwargs = {"num_tokens": 19, "max_seq_len": TOKENS_COUNTED, "dim": 64, "depth": 2, "heads": HEADS, "dim_head": 16}
    model = Transformer(**kwargs, causal=True, loss_chunk_size=64, reversible=False, **SIDES_COUNTED)
    zero_grads(model)
    tokens = torch.randint(19, (1, TOKENS_COUNTED))
    tokens = tokens if context is None else context.shard(tokens)
    with LiveBytes() as count:
        with nullcontext() if context is None else context:
            loss = model(tokens, labels=tokens)
        loss.backward()
    return count.peak


def operations(context: ContextParallel) -> int:
    """Floating-point operations of causal attention's matrix products here, forward and backward."""
    whole = [numbers(1, TOKENS_COUNTED, HEADS, 8, seed=i) for i in range(3)]
    own = context.shard(whole[0], None, *whole[1:])
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in own if x is not None)
    with FlopCounterMode(display=False) as count, context:
        out = dot_product_attention(q, k, v, causal=True, backend="products", **SIDES_COUNTED)
        out.sum().backward()
    return count.get_total_flops()


def cases(world: int) -> list[tuple[str, str, str, torch.dtype]]:
    """Kind, name, method and dtype of what is computed; heads in groups of fewer than processes are not exchanged."""
    methods = ("ring", "all_to_all", "ring gqa", "all_to_all gqa")
    found = [("attention", seen, method, torch.float64) for seen in SEEN for method in methods[:2]]
    found += [("attention", seen, method, torch.float64) for seen in GROUPED for method in methods[2:]]
    found += [("attention", seen, method, torch.float32) for seen in IN_FP32 for method in methods[:2]]
    for name, settings in NETWORKS.items():
        exchanged = HEADS // settings.get("head_chunks", 1) >= world
        found += [("network", name, method, torch.float64) for method in methods[: 1 + exchanged]]
    return [*found, ("network", "alibi pieces", "auto", torch.float32)]


def compute(
    kind: str, name: str, context: ContextParallel | None, method: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    return attended(name, method, context, dtype) if kind == "attention" else trained(name, context, dtype)


def refusals(context: ContextParallel) -> list[str]:
    """What those are told who ask for what would mean something else on one device."""
    tokens = context.shard(torch.zeros(1, TOKENS, dtype=torch.long))
    models = [network(name, torch.float64) for name in ("learned", "alibi pieces")]
    q = numbers(1, HEADS, tokens.shape[1], 8)
    asked = [
        *(lambda model=model: model(tokens, cache=KVCache()) for model in models),
        lambda: AutoregressiveWrapper(models[0])(tokens),
        lambda: dot_product_attention(q, q[:, :, :3], q[:, :, :3]),
        lambda: dot_product_attention(q, q, q, backend="naive"),
        lambda: context.shard(torch.zeros(2, 100), torch.zeros(2, 99)),
        lambda: context.shard(torch.zeros(4)),
    ]
    told = []
    for ask in asked:
        try:
            with context, torch.no_grad():
                ask()
            told.append("nothing")
        except (NotImplementedError, ValueError) as error:
            told.append(str(error))
    assert context.num_tokens == TOKENS, "what was refused divides nothing"
    return told


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    join(rank, world, directory)
    found = {}
    for kind, name, method, dtype in cases(world):
        context = ContextParallel(dist.group.WORLD, method=method.split()[0])
        for key, value in compute(kind, name, context, method, dtype).items():
            found[f"{kind}/{name}/{method}/{dtype}/{key}"] = value
    save_file(found, directory / f"{world}-{rank}.safetensors")
    ring.SLICE["cpu"], all_to_all.AT_ONCE["cpu"] = 2**13, 2**18
    counted = {}
    for method in ("ring", "all_to_all"):
        context = ContextParallel(dist.group.WORLD, method=method)
        counted[method] = {"peak": peak(context), "operations": operations(context)}
    (directory / f"counted-{world}-{rank}.json").write_text(json.dumps(counted))
    (directory / f"refusals-{world}-{rank}.txt").write_text("\n".join(refusals(ContextParallel(dist.group.WORLD))))
    leave()


if __name__ == "__main__":
    main()
