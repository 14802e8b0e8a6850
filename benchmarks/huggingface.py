"""A training step of a small Llama as transformers has it, and after make_memory_efficient: memory and time.

    python benchmarks/huggingface.py [--tokens 4096 8192 16384] [--rounds N] [--output FOLDER]
    python benchmarks/huggingface.py --tokens --longest 8GiB [--run own]

Llama of dim 512, 4 layers, 8 heads, vocabulary 32000, random weights, fp32, one sequence; a forward and backward with
its loss, each in a fresh process and in turn. Memory is the peak above the built model and its gradients (the resident
set's high-water mark), after a short step that loads what is used first. Seconds are of that one step, in which the
allocator returns every block at once, for all alike. Of several rounds the medians count, and those of the ratios
within a round. With --longest the planner says how long a sequence fits into a size, model and gradients included; of
the systems named by --run it is run. Writes huggingface.json and huggingface.md to FOLDER; rounds are added to what the
file has already of the same machine and versions. `python benchmarks/readme.py` copies the latter into the README.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, __version__
from transformers.modeling_outputs import CausalLMOutput

from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak, zero_grads
from memory_efficient_attention_pytorch.benchmarking.report import table
from memory_efficient_attention_pytorch.benchmarking.results import describe_machine, describe_place
from memory_efficient_attention_pytorch.huggingface import make_memory_efficient
from memory_efficient_attention_pytorch.huggingface.planning import ExampleInputs, on_meta
from memory_efficient_attention_pytorch.planner import Plan, format_size, max_seq_len, parse_size, plan
from memory_efficient_attention_pytorch.training.files import write_atomically

ROOT = Path(__file__).resolve().parent
SYSTEMS = {
    "own": "its own gradient checkpointing",
    "chunked loss": "the same, with PyTorch's chunked loss",
    "ours": "after make_memory_efficient",
}
WARM_UP = 1024


class ChunkedLoss(nn.Module):
    """A Llama with PyTorch's loss in place of its own."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, input_ids: Tensor, labels: Tensor, **others: Any) -> Any:
        hidden = self.llama.model(input_ids=input_ids, **others).last_hidden_state[:, :-1].flatten(0, 1)
        options = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(hidden, self.llama.lm_head.weight, labels[:, 1:].flatten(), options=options)
        return CausalLMOutput(loss=loss)


def make_model(system: str, tokens: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=tokens, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    if system == "ours":
        make_memory_efficient(model)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return ChunkedLoss(model) if system == "chunked loss" else model


def build(system: str, tokens: int) -> Callable[[], None]:
    """The model with its gradients, and its step; the target of ``measure_peak``."""
    torch.manual_seed(0)
    model = make_model(system, tokens)
    ids = torch.randint(32000, (1, tokens))

    def step(length: int = tokens) -> None:
        model(input_ids=ids[:, :length], labels=ids[:, :length], use_cache=False).loss.backward()

    step(min(WARM_UP, tokens))
    zero_grads(model)
    return step


def planned(system: str, tokens: int) -> Plan:
    return plan(seq_len=tokens, batch_size=1, **_to_be_planned(system))


def beyond_the_model(made: Plan) -> int:
    state = made.timeline.breakdown(0)
    return made.peak_bytes - state["parameters"] - state["gradients"]


def _to_be_planned(system: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = on_meta(make_model(system, 1 << 20))
    inputs = ExampleInputs(model)
    return {"model_or_config": model, "example_inputs": inputs, "optimizer": None, "device": "cpu"}


def measure(runs: list[dict[str, Any]], system: str, tokens: int) -> None:
    """Add a round to the system's runs at this length."""
    found = measure_peak(f"{__file__}:build", {"system": system, "tokens": tokens})
    print(f"{tokens:6} {SYSTEMS[system]:<40}{found.peak_bytes / 1e6:8.0f} MB {found.seconds:8.1f} s", flush=True)
    run = next((run for run in runs if (run["system"], run["tokens"]) == (system, tokens)), None)
    if run is None:
        expected = beyond_the_model(planned(system, tokens))
        run = {"system": system, "tokens": tokens, "planned_bytes": expected, "peak_bytes": [], "seconds": []}
        runs.append(run)
    run["peak_bytes"].append(found.peak_bytes)
    run["seconds"].append(found.seconds)
    run["date"] = time.strftime("%Y-%m-%d")


def longest(system: str, budget: str, run: bool) -> dict[str, Any]:
    tokens = max_seq_len(budget=budget, **_to_be_planned(system))
    made = planned(system, tokens)
    state = made.peak_bytes - beyond_the_model(made)
    found = measure_peak(f"{__file__}:build", {"system": system, "tokens": tokens}) if run else None
    taken = None if found is None else state + found.peak_bytes
    print(
        f"{tokens:6} {SYSTEMS[system]:<40}in {budget}" + ("" if taken is None else f": {format_size(taken)}"),
        flush=True,
    )
    return {"system": system, "budget": budget, "tokens": tokens, "planned_bytes": made.peak_bytes, "peak_bytes": taken}


def ratio(run: dict[str, Any], first: dict[str, Any], name: str) -> float:
    return median(mine / its for mine, its in zip(run[name], first[name], strict=True))


def text(record: dict[str, Any]) -> str:
    first = {run["tokens"]: run for run in record["runs"] if run["system"] == "own"}
    rows = [
        [
            f"{run['tokens']}: {SYSTEMS[run['system']]}",
            f"{median(run['peak_bytes']) / 1e6:.0f}",
            f"{run['planned_bytes'] / 1e6:.0f}",
            f"{1 / ratio(run, first[run['tokens']], 'peak_bytes'):.1f}",
            f"{median(run['seconds']):.1f}",
            f"{ratio(run, first[run['tokens']], 'seconds'):.2f}",
            str(len(run["seconds"])),
        ]
        for run in record["runs"]
    ]
    dates = sorted({run["date"] for run in record["runs"]})
    parts = [
        "One forward and backward, loss included, of a small Llama of transformers: one sequence, dim 512, 4 layers, "
        "8 heads, vocabulary 32000, fp32, random weights. Memory is the peak above the built model and its gradients, "
        "and what the planner says of it beforehand; each in a fresh process, in turn, one step: medians. "
        f"{describe_place(record['machine'])}; torch {record['torch']}, transformers {record['transformers']}; "
        f"{', '.join(dates)}.",
        table(["tokens", "MB", "planned", "× less", "seconds", "× the first", "rounds"], rows),
    ]
    found = record["longest"]
    if found:
        shortest = next(each["tokens"] for each in found if each["system"] == "own")
        of_each = [
            [
                SYSTEMS[each["system"]],
                f"{each['tokens']:,}",
                f"{each['tokens'] / shortest:.1f}",
                "planned" if each["peak_bytes"] is None else f"run: {format_size(each['peak_bytes'])}",
            ]
            for each in found
        ]
        budget = format_size(parse_size(found[0]["budget"]))
        parts.append(table([f"longest sequence in {budget}, model and gradients included", "tokens", "×", ""], of_each))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--longest", metavar="SIZE")
    parser.add_argument("--run", nargs="*", default=[], choices=SYSTEMS)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "huggingface", metavar="FOLDER")
    args = parser.parse_args()
    names = [name for name in SYSTEMS if name != "chunked loss" or hasattr(F, "linear_cross_entropy")]
    place = {"machine": describe_machine("cpu"), "torch": torch.__version__, "transformers": __version__}
    record: dict[str, Any] = {**place, "runs": [], "longest": []}
    file = args.output / "huggingface.json"
    if file.exists():
        before = json.loads(file.read_text())
        if all(before.get(key) == value for key, value in place.items()):
            record |= before
    for tokens, _, name in itertools.product(args.tokens, range(args.rounds), names):
        measure(record["runs"], name, tokens)
    record["runs"].sort(key=lambda run: (run["tokens"], list(SYSTEMS).index(run["system"])))
    if args.longest:
        record["longest"] = [longest(name, args.longest, name in args.run) for name in names]
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(record, indent=1) + "\n")
    write_atomically(args.output / "huggingface.md", text(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
