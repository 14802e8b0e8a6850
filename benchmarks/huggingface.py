"""A training step of a small Llama as transformers has it, and after make_memory_efficient: memory and time.

    python benchmarks/huggingface.py [--tokens 4096 8192 16384] [--output FOLDER]

Llama of dim 512, 4 layers, 8 heads, vocabulary 32000, random weights, fp32, one sequence; a forward and backward with
its loss, each in a fresh process and in turn. Memory is the peak above the built model and its gradients (the resident
set's high-water mark), after a short step that loads what is used first. Seconds are of that one step, in which the
allocator returns every block at once, for all alike. Writes huggingface.json and huggingface.md to FOLDER.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak, zero_grads
from memory_efficient_attention_pytorch.benchmarking.report import table
from memory_efficient_attention_pytorch.benchmarking.results import describe_machine
from memory_efficient_attention_pytorch.training.files import write_atomically

ROOT = Path(__file__).resolve().parent
SYSTEMS = {
    "own": "its own gradient checkpointing",
    "chunked loss": "the same, with PyTorch's chunked loss",
    "ours": "after make_memory_efficient",
}
WARM_UP = 1024


def build(system: str, tokens: int) -> Callable[[], None]:
    """The model with its gradients, and its step; the target of ``measure_peak``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from memory_efficient_attention_pytorch.huggingface import make_memory_efficient

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=tokens, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(config.vocab_size, (1, tokens))
    if system == "ours":
        make_memory_efficient(model)
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})

    def step(length: int = tokens) -> None:
        x = ids[:, :length]
        if system == "chunked loss":
            hidden = model.model(input_ids=x, use_cache=False).last_hidden_state[:, :-1]
            options = torch.nn.LinearCrossEntropyOptions()
            loss = F.linear_cross_entropy(
                hidden.flatten(0, 1), model.lm_head.weight, x[:, 1:].flatten(), options=options
            )
        else:
            loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()

    step(min(WARM_UP, tokens))
    zero_grads(model)
    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "huggingface", metavar="FOLDER")
    args = parser.parse_args()
    names = [name for name in SYSTEMS if name != "chunked loss" or hasattr(F, "linear_cross_entropy")]
    runs: list[dict[str, Any]] = []
    for tokens in args.tokens:
        for name in names:
            found = measure_peak(f"{__file__}:build", {"system": name, "tokens": tokens})
            runs.append({"system": name, "tokens": tokens, "peak_bytes": found.peak_bytes, "seconds": found.seconds})
            print(f"{tokens:6} {SYSTEMS[name]:<40}{found.peak_bytes / 1e6:8.0f} MB {found.seconds:8.1f} s", flush=True)
    machine = describe_machine("cpu")
    first = {run["tokens"]: run for run in reversed(runs) if run["system"] == "own"}
    rows = [
        [
            f"{run['tokens']}: {SYSTEMS[run['system']]}",
            f"{run['peak_bytes'] / 1e6:.0f}",
            f"{first[run['tokens']]['peak_bytes'] / run['peak_bytes']:.1f}",
            f"{run['seconds']:.1f}",
            f"{run['seconds'] / first[run['tokens']]['seconds']:.2f}",
        ]
        for run in runs
    ]
    text = table(["tokens", "MB", "× less", "seconds, once", "× the first"], rows)
    place = f"{machine['processor']}, {machine['cores']} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    args.output.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "runs": runs}
    write_atomically(args.output / "huggingface.json", json.dumps(record, indent=1) + "\n")
    write_atomically(args.output / "huggingface.md", f"{text}\n\n{place}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
