"""The loss without the logits in a loop of one's own: the same gradients as cross-entropy's, in a part of its memory.

python examples/loss_in_your_loop.py --tokens 4096 --vocabulary 32000
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from memory_efficient_attention_pytorch import linear_cross_entropy
from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak


def losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunked: bool) -> Tensor:
    if chunked:
        return linear_cross_entropy(hidden, weight, labels)  # instead of the line below
    return cross_entropy(linear(hidden, weight).flatten(0, 1), labels.flatten())


def build(tokens: int, dim: int, vocabulary: int, chunked: bool):
    """What is there before the step, and the step: called in a process of its own to be measured."""
    hidden = torch.randn(1, tokens, dim, requires_grad=True)
    weight = nn.Parameter(torch.randn(vocabulary, dim) / dim**0.5)
    labels = torch.randint(vocabulary, (1, tokens))
    return lambda: losses(hidden, weight, labels, chunked).backward()


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args(arguments)

    shape = {"tokens": chosen.tokens, "dim": chosen.dim, "vocabulary": chosen.vocabulary}
    peaks = {}
    for name, chunked in (("cross_entropy", False), ("linear_cross_entropy", True)):
        peaks[name] = measure_peak(f"{__file__}:build", {**shape, "chunked": chunked}).peak_bytes
        print(f"{name:>20}: {peaks[name] / 2**20:7.1f} MiB for one forward and backward")

    # A loop of one's own: embedding, anything that makes hidden vectors, and the loss from those.
    torch.manual_seed(0)
    embedding = nn.Embedding(chosen.vocabulary, chosen.dim)
    body = nn.Sequential(nn.LayerNorm(chosen.dim), nn.Linear(chosen.dim, chosen.dim))
    optimizer = torch.optim.AdamW([*embedding.parameters(), *body.parameters()], lr=1e-3)
    text = torch.arange(129)[None] % chosen.vocabulary
    for number in range(1, chosen.steps + 1):
        loss = linear_cross_entropy(body(embedding(text[:, :-1])), embedding.weight, text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % max(1, chosen.steps // 4) == 0:
            print(f"step {number:3}  loss {loss.item():.3f}")
    return peaks


if __name__ == "__main__":
    main()
