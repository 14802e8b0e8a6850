"""Attention beside PyTorch's own kernels, forward and backward: paired ratios of processor or wall seconds.

``python benchmarks/attention.py [--threads N] [--clock wall|cpu] [--rounds R]``. Each line runs ours and PyTorch's in
turn; the ratio is the median over rounds, below 1 where ours is faster. A mask that PyTorch needs is made beforehand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_efficient_attention_pytorch import MaskFunction, dot_product_attention

Call = Callable[[], Tensor]


def cases() -> Iterator[tuple[str, Call, Call, list[Tensor]]]:
    """Name, ours, PyTorch's, and what is differentiated."""
    n = 4096
    leaves = heads(n, 8)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    yield "plain", ours(leaves), theirs(leaves), leaves
    yield "causal", ours(leaves, causal=True), theirs(leaves, is_causal=True), leaves
    padding = torch.arange(n)[None] >= 300
    mask = (causal & padding[:, None])[None]
    yield "causal + key padding", ours(leaves, causal=True, mask=padding), theirs(leaves, attn_mask=mask), leaves
    ids = (torch.arange(n) // 700)[None]
    mask = (causal & (ids[0][:, None] == ids[0][None]))[None, None]
    yield "documents, causal", ours(leaves, causal=True, document_ids=ids), theirs(leaves, attn_mask=mask), leaves
    numbers = ids.expand(1, n)

    def together(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (numbers[b, i] == numbers[b, j])

    yield "the same, a function", ours(leaves, mask=together), theirs(leaves, attn_mask=mask), leaves
    kept = MaskFunction(together)
    yield "the same, tiles kept", ours(leaves, mask=kept), theirs(leaves, attn_mask=mask), leaves
    # PyTorch has no kernel for it on a CPU: beside what it caps.
    capped = ours(leaves, attn_bias=lambda score, b, h, i, j: 30 * torch.tanh(score / 30), causal=True)
    yield "soft cap, causal", capped, theirs(leaves, is_causal=True), leaves

    leaves = heads(8192, 8)
    distance = torch.arange(8192)[:, None] - torch.arange(8192)[None]
    near = distance.abs() <= 1024
    yield "window 1024 at 8192", ours(leaves, window=1024), theirs(leaves, attn_mask=near), leaves
    near = near & (distance >= 0)
    yield "window 1024, causal, at 8192", ours(leaves, window=1024, causal=True), theirs(leaves, attn_mask=near), leaves

    leaves = heads(n, 2)
    yield "dropout", ours(leaves, dropout=0.1), theirs(leaves, dropout_p=0.1), leaves
    bias = torch.randn(1, 2, n, n, requires_grad=True)
    yield "bias gradient", ours(leaves, attn_bias=bias), theirs(leaves, attn_mask=bias), [*leaves, bias]
    row = torch.randn(1, 2, 1, n, requires_grad=True)
    wide = {"attn_mask": row.expand(1, 2, n, n), "dropout_p": 0.1}
    yield "bias gradient + dropout", ours(leaves, attn_bias=row, dropout=0.1), theirs(leaves, **wide), [*leaves, row]


def heads(n: int, h: int) -> list[Tensor]:
    return [torch.randn(1, h, n, 64, requires_grad=True) for _ in range(3)]


def ours(leaves: list[Tensor], **arguments: object) -> Call:
    return lambda: dot_product_attention(*leaves, **arguments)


def theirs(leaves: list[Tensor], **arguments: object) -> Call:
    return lambda: F.scaled_dot_product_attention(*leaves, **arguments)


def seconds(call: Call, leaves: list[Tensor], clock: Callable[[], float]) -> float:
    start = clock()
    out = call()
    torch.autograd.grad(out, leaves, out)
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    print(f"torch {torch.__version__}, {options.threads} threads, {options.clock} seconds, median of {options.rounds}")
    print(f"{'':32}{'ours':>8}{'PyTorch':>9}{'ratio':>7}")
    for name, mine, other, leaves in cases():
        seconds(mine, leaves, clock)
        seconds(other, leaves, clock)
        pairs = [(seconds(mine, leaves, clock), seconds(other, leaves, clock)) for _ in range(options.rounds)]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(x / y for x, y in pairs)
        print(f"{name:32}{a:8.2f}{b:9.2f}{ratio:7.2f}", flush=True)


if __name__ == "__main__":
    main()
