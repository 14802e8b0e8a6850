"""One of several processes that note what they send and compute, in order, for an attention over divided tokens.

Run as `python -m tests.distributed.counted_processes RANK WORLD DIRECTORY`. Goes to DIRECTORY/RANK.json, and what was
sent first of all, for two tokens, to DIRECTORY/first-RANK.json.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from memory_efficient_attention_pytorch import dot_product_attention
from memory_efficient_attention_pytorch.distributed import ContextParallel, all_to_all, ring
from memory_efficient_attention_pytorch.planner.flops import count_flops
from tests.processes import join, leave

HEADS, WIDTHS, BUCKET, CHUNK = 4, (8, 4), 16, 32
SLICE, AT_ONCE = 2**12, 2**15
"""So small that a chunk of keys is several slices, and heads are exchanged in several turns."""


class Case(NamedTuple):
    method: str
    kv_heads: int = HEADS
    sides: tuple[int | None, int | None] = (None, 0)
    batch: int = 1
    missing: int = 0
    dtype: str = "float32"
    bias: bool = False


CASES = [
    *(Case(method, kv, batch=batch) for method in ("ring", "all_to_all") for kv, batch in ((4, 1), (2, 2), (1, 1))),
    *(Case(method, 2, sides) for method in ("ring", "all_to_all") for sides in ((None, None), (20, 0), (10, 30))),
    *(Case(method, 2, missing=11, dtype="bfloat16") for method in ("ring", "all_to_all")),
    Case("all_to_all", 4, dtype="float64", bias=True),
    Case("ring", 2, (100, 0)),
]


class Noted(TorchDispatchMode):
    """Notes messages with their bytes, and floating-point operations between them in one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[list[Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in ("send", "recv_"):
            tensors, _, peer, *_ = args
            self.events.append(["send" if name == "send" else "receive", peer, sum(t.nbytes for t in tensors)])
        elif func.namespace == "c10d" and name == "alltoall_base_":
            self.events.append(["exchange", args[1].nbytes])
        elif func.namespace == "c10d" and name == "allreduce_" and args[0][0].numel() == 1:
            # Others are of the largest values, which on a CPU decide how scores are computed.
            self.events.append(["meet"])
        out = func(*args, **(kwargs or {}))
        operations = 0 if func.namespace == "c10d" else count_flops(func, args, kwargs or {}, out)
        if operations and self.events and self.events[-1][0] == "compute":
            self.events[-1][1] += operations
        elif operations:
            self.events.append(["compute", operations])
        return out


def attended(case: Case, world: int) -> dict[str, list[list[Any]]]:
    tokens, dtype, (d, e) = 2 * world * CHUNK - case.missing, getattr(torch, case.dtype), WIDTHS
    shapes = ((HEADS, d), (case.kv_heads, d), (case.kv_heads, e))
    whole = [torch.randn(case.batch, tokens, *shape).to(dtype) for shape in shapes]
    bias = torch.zeros(HEADS, tokens, tokens, dtype=dtype) if case.bias else None
    context = ContextParallel(dist.group.WORLD, method=case.method)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in context.shard(whole[0], None, *whole[1:]) if x is not None)
    forward, backward = Noted(), Noted()
    with forward, context:
        out = dot_product_attention(
            q, k, v, window=case.sides, attn_bias=bias, backend="products", q_bucket_size=BUCKET, k_bucket_size=BUCKET
        )
    with backward:
        out.float().sum().backward()
    return {"forward": forward.events, "backward": backward.events}


def of_two_tokens() -> list[list[Any]]:
    """The first two have one each: more processes neither send nor receive."""
    context = ContextParallel(dist.group.WORLD, method="ring")
    q = context.shard(torch.randn(1, 2, HEADS, 8)).transpose(1, 2)
    with context, Noted() as noted:
        dot_product_attention(q, q, q, causal=True)
    return noted.events


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    join(rank, world, directory)
    first = [of_two_tokens() for _ in range(2)]
    (directory / f"first-{rank}.json").write_text(json.dumps(first))
    ring.SLICE["cpu"], all_to_all.AT_ONCE["cpu"] = SLICE, AT_ONCE
    torch.manual_seed(0)
    (directory / f"{rank}.json").write_text(json.dumps([attended(case, world) for case in CASES]))
    leave()


if __name__ == "__main__":
    main()
