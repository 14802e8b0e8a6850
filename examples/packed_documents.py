"""ALiBi and packed documents in one call of attention: no padding, no n × n mask, each document on its own.

python examples/packed_documents.py --lengths 3000 900 4292
"""

import argparse

import torch
from torch import Tensor

from memory_efficient_attention_pytorch import AlibiBias, dot_product_attention, select_backend


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[900, 250, 898], help="of the documents")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    tokens, alibi = sum(chosen.lengths), AlibiBias(chosen.heads)
    q, k, v = (torch.randn(1, chosen.heads, tokens, chosen.width, requires_grad=True) for _ in range(3))
    document_ids = torch.repeat_interleave(torch.arange(len(chosen.lengths)), torch.tensor(chosen.lengths))[None]

    packed = {"causal": True, "document_ids": document_ids, "attn_bias": alibi}
    print(f"{len(chosen.lengths)} documents in a row of {tokens:,} tokens, {chosen.heads} heads")
    print(select_backend(q, k, v, **packed))
    out = dot_product_attention(q, k, v, **packed)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))

    # The same, one document after the other: distances are what ALiBi sees, so it does not matter where one begins.
    def alone(x: Tensor) -> tuple[Tensor, ...]:
        return x.split(chosen.lengths, dim=2)

    parts = [
        dot_product_attention(*part, causal=True, attn_bias=alibi)
        for part in zip(alone(q), alone(k), alone(v), strict=True)
    ]
    expected = torch.cat(parts, dim=2)
    pairs = zip(gradients, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True)
    worst = max((a - b).abs().max().item() for a, b in [(out, expected), *pairs])
    print(f"largest difference from each document by itself, gradients included: {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
