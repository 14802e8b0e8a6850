"""Seconds per generated token beside Hugging Face's GPT-2 of the same shape, each with its cache, in one process.

    python benchmarks/generation.py [--prompt-tokens N] [--num-tokens N] ...
    python benchmarks/generation.py --threads 1 --processor-time     where others use the machine too

Both read the same prompt, then generate greedily, a few tokens each in alternation, so that whatever else the machine
does falls on both. GPT-2 is measured in a bare loop around its forward pass, and by its own `generate`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.streamers import BaseStreamer

from memory_efficient_attention_pytorch import AutoregressiveWrapper, Transformer


def ours(args: argparse.Namespace, prompt: Tensor, positions: str) -> Iterator[Tensor]:
    model = Transformer(
        num_tokens=args.num_tokens,
        max_seq_len=args.prompt_tokens + args.tokens,
        dim=args.dim,
        depth=args.depth,
        heads=args.heads,
        dim_head=args.dim // args.heads,
        causal=True,
        positions=positions,
    )
    return AutoregressiveWrapper(model.eval()).stream(prompt, args.tokens, temperature=0.0)


def gpt2(args: argparse.Namespace) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=args.num_tokens,
        n_positions=args.prompt_tokens + args.tokens,
        n_embd=args.dim,
        n_layer=args.depth,
        n_head=args.heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def bare_loop(model: GPT2LMHeadModel, prompt: Tensor, tokens: int) -> Iterator[Tensor]:
    new, cache = prompt, None
    for _ in range(tokens):
        out = model(new, past_key_values=cache, use_cache=True)
        cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield new[:, 0]


class Clock(BaseStreamer):
    """Notes when `generate` hands over each token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


def own_generate(model: GPT2LMHeadModel, prompt: Tensor, tokens: int, clock: Callable[[], float]) -> float:
    """Median seconds between two tokens of GPT-2's `generate`."""
    streamer = Clock(clock)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=streamer,
    )
    return statistics.median(b - a for a, b in zip(streamer.times[1:], streamer.times[2:], strict=False))


def seconds(tokens: Iterator[Tensor], count: int, clock: Callable[[], float]) -> list[float]:
    """Of each of the next ``count`` tokens."""
    found = []
    for _ in range(count):
        begin = clock()
        next(tokens)
        found.append(clock() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--num-tokens", type=int, default=256, help="size of the vocabulary (%(default)s)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens-a-round", type=int, default=8)
    parser.add_argument("--positions", nargs="+", default=["learned", "rotary", "alibi"], help="of ours")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's default)")
    parser.add_argument("--processor-time", action="store_true", help="count what all threads spend, not what passes")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    if args.threads:
        torch.set_num_threads(args.threads)
    args.tokens = 1 + args.rounds * args.tokens_a_round

    torch.manual_seed(0)
    prompt = torch.randint(args.num_tokens, (1, args.prompt_tokens))
    model = gpt2(args)
    running = {"GPT-2, bare loop": bare_loop(model, prompt, args.tokens)}
    running |= {f"ours, {positions}": ours(args, prompt, positions) for positions in args.positions}
    first = {name: seconds(tokens, 1, clock)[0] for name, tokens in running.items()}
    each: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(args.rounds):
        for name, tokens in running.items():
            each[name].append(statistics.median(seconds(tokens, args.tokens_a_round, clock)))
    reference = each["GPT-2, bare loop"]
    print(f"{'':<20}{'prompt s':>10}{'s/token':>10}{'ratio to the bare loop (rounds)':>36}")
    for name, times in each.items():
        ratios = sorted(mine / theirs for mine, theirs in zip(times, reference, strict=True))
        spread = f"{statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{name:<20}{first[name]:>10.3f}{statistics.median(times):>10.4f}{spread:>36}")
    alone = own_generate(model, prompt, args.tokens, clock)
    print(f"{'GPT-2, generate':<20}{'':>10}{alone:>10.4f}{'(alone, at the end)':>36}")


if __name__ == "__main__":
    main()
