"""The chunked loss against PyTorch's: peak memory, each in a fresh process, and time, in turn in one process.

    python benchmarks/linear_cross_entropy.py [--tokens 4096 --width 256 --vocabulary 32000 --dtype float32]
    python benchmarks/linear_cross_entropy.py --threads 1 --chunk-sizes 32 64 128 256 512

One forward and backward of the mean loss, gradients for the hidden vectors and the weight. Memory is how far the
process's resident set rises (Linux only) above the inputs, after a small run of the same code has loaded its kernels;
glibc is told to return freed blocks. Times are the median of the rounds and of each round's ratio to ours. With one
thread they are processor seconds, which a busy machine hardly disturbs, with more they are seconds on the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak
from memory_efficient_attention_pytorch.loss.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def losses(chunk_sizes: Sequence[int]) -> dict[str, Loss]:
    """The losses this PyTorch can run, by name: ours first, with its own chunk size and with each of these."""
    found: dict[str, Loss] = {"ours": linear_cross_entropy}
    found |= {f"ours, {size}": partial(linear_cross_entropy, chunk_size=size) for size in chunk_sizes}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, chunked"] = partial(F.linear_cross_entropy, options=options)
    found["torch, plain"] = lambda h, w, y: F.cross_entropy(F.linear(h, w), y)
    return found


def inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden vectors, weight and labels; the logits are about normally distributed."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) * width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,))


def build(name: str, chunk_sizes: list[int], tokens: int, width: int, vocabulary: int, dtype: str) -> Callable[[], Any]:
    """A forward and backward of the loss of that name; a target of ``measure_peak``."""
    loss, kind = losses(chunk_sizes)[name], getattr(torch, dtype)
    loss(*inputs(64, width, 512, kind)).backward()
    tensors = inputs(tokens, width, vocabulary, kind)
    return lambda: loss(*tensors).backward()


def seconds_in_turn(candidates: dict[str, Loss], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a forward and backward, every loss once in each round."""
    tensors = inputs(args.tokens, args.width, args.vocabulary, getattr(torch, args.dtype))
    clock = time.process_time if args.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(args.rounds + 1):
        for name, loss in candidates.items():
            for tensor in tensors[:2]:
                tensor.grad = None
            start = clock()
            loss(*tensors).backward()
            if turn:  # the first round only warms up
                seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunk-sizes", type=int, nargs="*", default=[], help="to run ours with, besides its default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    candidates = losses(args.chunk_sizes)
    shape = {name: getattr(args, name) for name in ("chunk_sizes", "tokens", "width", "vocabulary", "dtype")}
    memory = {
        name: measure_peak(f"{__file__}:build", {"name": name, **shape}, threads=args.threads).peak_bytes / 2**20
        for name in candidates
    }
    seconds = seconds_in_turn(candidates, args)
    print(
        f"{args.tokens} x {args.width} x {args.vocabulary}, {args.dtype}, {args.threads} threads, {torch.__version__}"
    )
    print(f"{'':16}{'MiB':>9}{'s':>8}{'x ours':>8}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["ours"], strict=True))
        print(f"{name:16}{memory[name]:>9.1f}{statistics.median(times):>8.2f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
