"""Every way of computing attention beside the one that ``auto`` takes, forward and backward, in turn in one process.

    python benchmarks/attention.py                       28 shapes and masks, about half an hour on two cores
    python benchmarks/attention.py --lengths 4096 --widths 64 --cases causal window

For each case: the median seconds of each way that serves it, of PyTorch's own attention (a mask that it needs is made
beforehand), and the ratio of the way that ``auto`` takes to the fastest, which is the median over rounds of the paired
ratio. The last line is the worst of these. Above 1.05 something is chosen that does not pay on this machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_efficient_attention_pytorch import MaskFunction, dot_product_attention, select_backend
from memory_efficient_attention_pytorch.attention.decision import WAYS
from memory_efficient_attention_pytorch.benchmarking.results import processor
from memory_efficient_attention_pytorch.layers.positions import AlibiBias

Call = Callable[[], Tensor]
HEADS = 8
CASES = ("plain", "causal", "window", "padding", "documents", "ALiBi", "dropout")
# By functions, and what is differentiated, too: for these there is less to choose from.
OTHERS = ("mask function", "mask function, kept", "soft cap", "bias", "bias gradient")


def arguments_of(case: str, n: int) -> tuple[dict[str, object], dict[str, object]]:
    """What is asked of ours, and what of PyTorch's."""
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    if case == "window":
        return {"causal": True, "window": 1024}, {"attn_mask": causal & (distance <= 1024)}
    if case == "padding":
        padding = torch.arange(n)[None] >= n // 10
        return {"causal": True, "mask": padding}, {"attn_mask": causal & padding}
    if case == "documents" or case.startswith("mask function"):
        ids = (torch.arange(n) // 700)[None]
        theirs = {"attn_mask": causal & (ids.mT == ids)}
        if case == "documents":
            return {"causal": True, "document_ids": ids}, theirs

        def together(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (ids[0, i] == ids[0, j])

        return {"mask": MaskFunction(together) if case.endswith("kept") else together}, theirs
    if case == "soft cap":  # PyTorch has no kernel for it on a CPU: beside what it caps
        return {"causal": True, "attn_bias": lambda s, b, h, i, j: 30 * torch.tanh(s / 30)}, {"is_causal": True}
    if case == "ALiBi":
        bias = AlibiBias(HEADS)
        values = bias(torch.arange(n), torch.arange(n)).masked_fill(~causal, -torch.inf)
        return {"causal": True, "attn_bias": bias}, {"attn_mask": values}
    if case == "dropout":
        return {"causal": True, "dropout": 0.1}, {"is_causal": True, "dropout_p": 0.1}
    if case in ("bias", "bias gradient"):  # random, so that it does not fall with distance
        bias = torch.randn(1, HEADS, n, n, requires_grad=case == "bias gradient")
        return {"attn_bias": bias}, {"attn_mask": bias}
    return {"causal": case == "causal"}, {"is_causal": case == "causal"}


def calls(case: str, n: int, leaves: list[Tensor]) -> tuple[str, dict[str, Call]]:
    """The name of the way that ``auto`` takes, and every call by the name of its way; a bias joins the leaves."""
    ours, theirs = arguments_of(case, n)
    leaves += [x for x in ours.values() if isinstance(x, Tensor) and x.requires_grad]
    heads = leaves[:3]
    found: dict[str, Call] = {}
    for way in WAYS:
        try:
            select_backend(*heads, backend=way.name, **ours)
        except NotImplementedError:
            continue
        if way.backend != "naive":
            found[way.name] = lambda name=way.name: dot_product_attention(*heads, backend=name, **ours)
    found["PyTorch"] = lambda: F.scaled_dot_product_attention(*heads, **theirs)
    return select_backend(*heads, **ours).way, found


def seconds(call: Call, leaves: list[Tensor]) -> float:
    start = time.perf_counter()
    out = call()
    torch.autograd.grad(out, leaves, out)
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """Of each case: its name, what ``auto`` takes, and the seconds of each way in every round."""
    for n in options.lengths:
        for d in options.widths:
            for case in options.cases:
                leaves = [torch.randn(1, HEADS, n, d, requires_grad=True) for _ in range(3)]
                chosen, ways = calls(case, n, leaves)
                ways = {name: call for name, call in ways.items() if name not in options.without or name == chosen}
                times: dict[str, list[float]] = {name: [] for name in ways}
                for round_ in range(options.rounds + 1):
                    for name, call in ways.items():
                        took = seconds(call, leaves)
                        if round_:
                            times[name].append(took)
                yield f"{case}, {n} × {d}", chosen, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--cases", nargs="+", choices=CASES + OTHERS, default=CASES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without", nargs="*", default=(), help="names of ways to leave out")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, {HEADS} heads, median seconds")
    names = calls("plain", 64, [torch.randn(1, HEADS, 64, 64) for _ in range(3)])[1]
    print(f"{'':26}" + "".join(f"{name:>12}" for name in names) + f"{'auto':>12}{'÷ best':>8}")
    worst, where = 0.0, ""
    for title, chosen, times in measure(options):
        ours = {name: values for name, values in times.items() if name != "PyTorch"}
        best = min(ours, key=lambda name: statistics.median(ours[name]))
        ratio = statistics.median(a / b for a, b in zip(ours[chosen], ours[best], strict=True))
        medians = (f"{statistics.median(times[name]):12.2f}" if name in times else f"{'–':>12}" for name in names)
        print(f"{title:26}" + "".join(medians) + f"{chosen:>12}{ratio:8.2f}", flush=True)
        worst, where = max((worst, where), (ratio, title))
    print(f"worst: {worst:.2f} ({where})")


if __name__ == "__main__":
    main()
