"""A classifier of long byte sequences (DNA, say) whose class depends on one place far from where it is asked for.

    python examples/classify_bytes.py --tokens 2048

Somewhere in the first quarter of random bases one is marked, in one of two ways: the class. It is asked for at the last
token, by the language model's own loss with a label at that token alone. The data are made here. Sequences grow while
it learns: among many bases the mark is hard to find at first, and once found it stays so.
"""

import argparse

import torch

from memory_efficient_attention_pytorch import Transformer, plan

BASES, ASK = 4, 6  # tokens 0-3: bases; 4, 5: marked ones; 6: the question; 0 and 1 are the answers, too


def batch(size: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences ``(size, tokens)`` and their classes ``(size,)``."""
    x = torch.randint(BASES, (size, tokens), generator=generator)
    classes = torch.randint(2, (size,), generator=generator)
    places = torch.randint(tokens // 4, (size,), generator=generator)
    x[torch.arange(size), places] = BASES + classes
    x[:, -1] = ASK
    return x, classes


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Transformer(
        num_tokens=8, max_seq_len=chosen.tokens, dim=64, depth=2, heads=4, dim_head=16, causal=True, positions="none"
    )
    step = plan(model, batch_size=chosen.batch_size, seq_len=chosen.tokens)
    print(f"a step on {chosen.batch_size} × {chosen.tokens:,} tokens needs {step.peak_bytes / 2**20:,.0f} MiB")

    optimizer, shortest = torch.optim.AdamW(model.parameters(), lr=3e-3), min(32, chosen.tokens)
    for number in range(1, chosen.steps + 1):
        grown = min(1.0, 1.5 * number / chosen.steps)  # whole in the last third of the steps
        tokens = round(shortest * (chosen.tokens / shortest) ** grown)
        x, classes = batch(chosen.batch_size, tokens, generator)
        labels = torch.full_like(x, -100)  # no label but the last
        labels[:, -1] = classes
        loss = model(x, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % max(1, chosen.steps // 10) == 0:
            print(f"step {number:4}  loss {loss.item():.3f}")

    x, classes = batch(64, chosen.tokens, generator)
    with torch.no_grad():
        found = model.eval()(x)[:, -1, :2].argmax(-1)
    accuracy = (found == classes).float().mean().item()
    print(f"{accuracy:.0%} of 64 new sequences are told right (by chance 50%)")
    return accuracy


if __name__ == "__main__":
    main()
