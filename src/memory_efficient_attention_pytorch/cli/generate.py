"""Write text with a model that `mea train` trained: the prompt, then the model's continuation as it is generated.

  mea generate runs/1 --prompt 'import '
  mea generate runs/1 --prompt 'def ' --prompt 'class '
      both at once; each comes out as it would alone
  mea generate runs/1 < letter.txt
      the prompt from standard input, less a newline at its end

Only the text goes to standard output.
"""

import argparse
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TextIO

from .terminal import note, visible

if TYPE_CHECKING:
    import torch

    from ..models.generation import AutoregressiveWrapper
    from ..training.run_directory import LoadedRun
    from ..training.tokenizers import Tokenizer

_COMMAND = "mea generate"
_STANDARD_INPUT = "-"
# Most tokens that are decoded again for each new one: otherwise the time per token would grow with the text.
_LONGEST_CONTEXT = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mea generate RUN [options]"
    parser.add_argument("run", metavar="RUN", help="the run's directory, finished or not")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="the text to continue; may be repeated; - or none: standard input",
    )
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens to add (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="sample among the likeliest tokens that add up to X (default: all)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text (default: random)")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="lowest validation loss or newest (%(default)s)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: the accelerator if there is one (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if args.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {args.tokens}")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be a whole number from 0 to 2**63 - 1, got {args.seed}")
    texts = [_standard_input() if text == _STANDARD_INPUT else text for text in args.prompt or [_STANDARD_INPUT]]
    seed = secrets.randbits(32) if args.seed is None else args.seed

    loaded = _load(args)
    prompts = [_encode(text, loaded.tokenizer) for text in texts]
    steps = _generate(loaded, prompts, _seeds(texts, seed), args)
    began = time.perf_counter()
    made = _print_texts([_Text(loaded.tokenizer, prompt) for prompt in prompts], steps)
    if sys.stderr.isatty():
        seconds = time.perf_counter() - began
        print(f"{made} tokens in {seconds:.1f} s, {made / seconds:.0f} a second; seed {seed}", file=sys.stderr)
    return 0


def _load(args: argparse.Namespace) -> "LoadedRun":
    import torch

    from ..training.run_directory import load_run

    accelerator = None if args.device == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return load_run(args.run, checkpoint=args.checkpoint, device=accelerator or "cpu", report=partial(note, _COMMAND))


def _standard_input() -> str:
    """Read standard input, less a newline at its end; bytes that are not UTF-8 become surrogates, as in arguments."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt TEXT, or pipe a text into mea generate")
    text = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape").removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError("standard input is empty: give --prompt TEXT, or pipe a text into mea generate")
    return text


def _encode(text: str, tokenizer: "Tokenizer") -> list[int]:
    from ..training.tokenizers import ByteTokenizer

    if not text:
        raise ValueError("the prompt is empty: give at least one character")
    if not isinstance(tokenizer, ByteTokenizer) and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the prompt is not UTF-8, which this run's tokenizer needs")
    tokens = tokenizer.encode(text)
    if not tokens:
        raise ValueError("this run's tokenizer turns the prompt into no tokens: give more text")
    return tokens


def _seeds(texts: Sequence[str], seed: int) -> list[int]:
    """Return a seed per prompt, so that each gets the same text as alone; a repeated prompt gets the next seed."""
    before: Counter[str] = Counter()
    seeds = []
    for text in texts:
        seeds.append(seed + before[text])
        before[text] += 1
    return seeds


def _generate(
    loaded: "LoadedRun", prompts: Sequence[Sequence[int]], seeds: Sequence[int], args: argparse.Namespace
) -> "Iterator[torch.Tensor]":
    """Generate for all prompts together, step by step."""
    import torch

    from ..models.generation import AutoregressiveWrapper, pad_left

    end, device = loaded.tokenizer.end_id, next(loaded.model.parameters()).device
    wrapper = AutoregressiveWrapper(loaded.model, pad_value=0 if end is None else end)
    start, mask = (tensor.to(device) for tensor in pad_left(prompts))
    steps = wrapper.stream(
        start,
        args.tokens,
        eos_token=end,
        temperature=args.temperature,
        filter_thres=0.0,
        top_k=args.top_k,
        top_p=args.top_p,
        mask=mask,
        generator=[torch.Generator(device).manual_seed(seed) for seed in seeds],
    )
    _note_length(wrapper, start.shape[1], args.tokens)
    return steps


def _note_length(wrapper: "AutoregressiveWrapper", longest: int, tokens: int) -> None:
    """Print what happens beyond the model's length, if generation may reach it."""
    limit = wrapper.max_seq_len
    if longest + tokens <= limit:
        return
    how = {
        "window": "nothing changes, since no token looks back further than the model's window",
        "slide": f"each token sees the last {limit} and none before",
        "recompute": f"the model reads the last {limit} again for each token, since its learned positions end there, "
        "which takes longer",
    }[wrapper.beyond_max_seq_len]
    note(_COMMAND, f"prompt and text may exceed {limit} tokens, the length the model was trained on: beyond it {how}")


def _print_texts(texts: "Sequence[_Text]", steps: "Iterator[torch.Tensor]") -> int:
    """Print every text while its tokens come and return how many tokens came."""
    printer, made = _Printer(texts, sys.stdout), 0
    try:
        printer.show()
        for step in steps:
            for text, token in zip(texts, step.tolist(), strict=True):
                made += not text.ended
                text.add(token)
            printer.show()
    finally:
        # An interrupted text ends too, so that further output begins on a new line.
        for text in texts:
            text.ended = True
        printer.show()
    return made


class _Printer:
    """Prints texts in order: one is streamed while later ones wait for its end, since a terminal has one cursor."""

    def __init__(self, texts: "Sequence[_Text]", out: TextIO):
        self.texts, self.out = texts, out
        self.current, self.begun = 0, False
        self.shown = visible if out.isatty() else str

    def show(self) -> None:
        """Print everything that may be printed so far."""
        while self.current < len(self.texts):
            text = self.texts[self.current]
            if len(self.texts) > 1 and not self.begun:
                self.out.write(f"[{self.current + 1}/{len(self.texts)}]\n")
            self.begun = True
            self.out.write(self.shown(text.take()))
            if not text.ended:
                break
            self.out.write("\n")
            self.current, self.begun = self.current + 1, False
        self.out.flush()


class _Text:
    """Decodes tokens to text as they come: a character appears once all of its tokens have."""

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int]):
        self.tokenizer, self.ended = tokenizer, False
        # Decoded together, since a token's text may depend on earlier tokens; `taken` characters have been printed.
        self.tokens, self.taken = list(prompt), 0

    def add(self, token: int) -> None:
        """Add the next token; after the end of the text it is ignored."""
        self.ended = self.ended or token == self.tokenizer.end_id
        if not self.ended:
            self.tokens.append(token)

    def take(self) -> str:
        """Return the text since the last call. An incomplete character (it decodes to U+FFFD) waits for its rest."""
        decode = self.tokenizer.decode
        text = decode(self.tokens)
        whole = max(self.taken, len(text.rstrip("\ufffd")), len(text) - _LONGEST_CONTEXT)
        stable = len(text) if self.ended else whole
        new, self.taken = text[self.taken : stable], stable
        if stable == len(text) and len(self.tokens) > _LONGEST_CONTEXT:
            tokens = self.tokens[-_LONGEST_CONTEXT // 2 :]
            while len(tokens) > 1 and decode(tokens).startswith("\ufffd"):
                tokens = tokens[1:]
            self.tokens, self.taken = tokens, len(decode(tokens))
        return new
