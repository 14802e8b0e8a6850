"""What torch.compile makes of the Transformer: graphs, breaks, the seconds they cost and the step's afterwards.

    python benchmarks/compile.py [--backend inductor] [--steps 5] [--only NAME ...] [--output FOLDER]

Each configuration in a fresh process with an empty cache of kernels: a step eagerly, then compiled steps at four
lengths; compiling takes what the first two take beyond a later one. Seconds of a step are medians at one length,
eager and compiled in turn. Writes compile.json and compile.md to FOLDER.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.benchmarking.report import table
from memory_efficient_attention_pytorch.benchmarking.results import describe_provenance, provenance
from memory_efficient_attention_pytorch.training import TrainConfig
from memory_efficient_attention_pytorch.training.files import write_atomically
from memory_efficient_attention_pytorch.training.model import build_model

ROOT = Path(__file__).resolve().parent
README: dict[str, Any] = {"num_tokens": 256, "max_seq_len": 1_000_000, "dim": 512, "depth": 8, "heads": 8}
README |= {"causal": True, "positions": "rotary"}
MODELS: dict[str, tuple[Callable[[bool], Any], int, tuple[int, ...]]] = {
    "mea train": (lambda reversible: build_model(TrainConfig(reversible=reversible), 256), 8, (256, 192, 224, 160)),
    "README": (lambda reversible: Transformer(**README, reversible=reversible), 1, (512, 384, 448, 320)),
}
CASES = [(name, reversible) for name in MODELS for reversible in (True, False)]


def measure(name: str, reversible: bool, backend: str, steps: int) -> dict[str, Any]:
    """Graphs after each length, breaks and seconds, of this process."""
    from torch._dynamo import lookup_backend
    from torch._dynamo.utils import counters

    made, batch, lengths = MODELS[name]
    torch.manual_seed(0)
    model, graphs = made(reversible), []
    behind = lookup_backend(backend)

    def counted(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return behind(graph, example_inputs)

    def seconds(called: Any, length: int) -> float:
        model.zero_grad()
        tokens = torch.randint(256, (batch, length + 1))
        start = time.perf_counter()
        called(tokens[:, :-1], labels=tokens[:, 1:]).backward()
        return time.perf_counter() - start

    compiled = torch.compile(model, backend=counted)
    seconds(model, lengths[0])
    first, counts = [], []
    for length in lengths:
        first.append(seconds(compiled, length))
        counts.append(len(graphs))
    pairs = [(seconds(model, lengths[0]), seconds(compiled, lengths[0])) for _ in range(steps)]
    eager, later = (median(of) for of in zip(*pairs, strict=True))
    return {
        "model": name,
        "reversible": reversible,
        "lengths": lengths,
        "graphs": counts,
        "breaks": sum(counters["graph_break"].values()),
        "compile_seconds": [took - later for took in first],
        "eager_seconds": eager,
        "compiled_seconds": later,
    }


def report(facts: dict[str, Any]) -> str:
    head = ["model", "blocks", "graphs, first length", "second", "third and fourth", "compiling, first length"]
    head += ["second", "a step eagerly", "compiled"]
    rows = []
    for case in facts["cases"]:
        first, second, third, fourth = case["graphs"]
        later = f"{fourth - second} more"
        assert third <= fourth
        compiling = (f"{max(took, 0):.1f} s" for took in case["compile_seconds"][:2])
        step = (f"{case[key]:.2f} s" for key in ("eager_seconds", "compiled_seconds"))
        kind = "reversible" if case["reversible"] else "stored"
        rows.append([case["model"], kind, str(first), f"{second - first} more", later, *compiling, *step])
    where = describe_provenance(facts)
    return f"Training steps of torch.compile, backend {facts['backend']}: {where}.\n\n{table(head, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "compile")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        warnings.simplefilter("ignore")  # of the compiler, about what it does not follow
        name, reversible = json.loads(arguments.run)
        print(json.dumps(measure(name, reversible, arguments.backend, arguments.steps)))
        return
    found = []
    for case in CASES:
        if case[0] not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--run", json.dumps(case)]
            command += ["--backend", arguments.backend, "--steps", str(arguments.steps)]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
            told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        found.append(json.loads(told.splitlines()[-1]))
        print(found[-1], flush=True)
    facts = provenance() | {"threads": torch.get_num_threads(), "backend": arguments.backend, "cases": found}
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output / "compile.json", json.dumps(facts, indent=1) + "\n")
    write_atomically(arguments.output / "compile.md", report(facts))
    print(report(facts))


if __name__ == "__main__":
    main()
