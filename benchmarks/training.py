"""``mea train`` beside a plain PyTorch loop of the same size, batch and text, in turn, each in a fresh process.

    python benchmarks/training.py [--rounds 3] [--steps 40] [--threads 2] [--output FOLDER]

The plain loop is what one writes by hand: a pre-norm Transformer of one stream with learned positions on
``F.scaled_dot_product_attention``, ``F.cross_entropy``, the same fused AdamW and clipping. Beside it ``mea train`` as
it comes but for its positions, which are learned in all of them, with ``--no-reversible`` and with
``--reversible --no-keep-attention``. Tokens per second are of the median step after the first five, data included: of
``mea train`` as its metrics time it, without validations, samples and checkpoints. Of several rounds the median counts,
and that of the ratios within a round.
Writes training.json and training.md to FOLDER.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory_efficient_attention_pytorch.benchmarking.report import table
from memory_efficient_attention_pytorch.benchmarking.results import describe_provenance, provenance
from memory_efficient_attention_pytorch.training import TrainConfig
from memory_efficient_attention_pytorch.training.files import write_atomically

ROOT = Path(__file__).resolve().parent
PLAIN = "plain PyTorch loop"
WAYS = {
    "mea train": (),
    "mea train --no-reversible": ("--no-reversible",),
    "mea train --reversible --no-keep-attention": ("--reversible", "--no-keep-attention"),
}
SKIPPED = 5
OPTIONS = TrainConfig(positions="learned")


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_ff = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff = nn.Sequential(nn.Linear(dim, ff_mult * dim), nn.GELU(), nn.Linear(ff_mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.to_qkv(self.norm_attention(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, -1))
        return x + self.ff(self.norm_ff(x))


class Model(nn.Module):
    def __init__(self, config: TrainConfig, num_tokens: int = 256) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, config.dim)
        self.positions = nn.Embedding(config.seq_len, config.dim)
        self.blocks = nn.Sequential(
            *(Block(config.dim, config.heads, config.dim_head, config.ff_mult) for _ in range(config.depth))
        )
        self.norm = nn.LayerNorm(config.dim)
        self.to_logits = nn.Linear(config.dim, num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return self.to_logits(self.norm(self.blocks(hidden)))


def plain(data: Path, steps: int) -> list[float]:
    """Seconds of each step of the plain loop."""
    config = OPTIONS
    torch.manual_seed(config.seed)
    model = Model(config)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    text = np.memmap(data, dtype=np.uint8, mode="r")
    chance = np.random.default_rng(config.seed)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        starts = chance.integers(0, len(text) - config.seq_len - 1, config.batch_size)
        windows = torch.from_numpy(np.stack([text[i : i + config.seq_len + 1] for i in starts]).astype(np.int64))
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds


def trained(data: Path, steps: int, options: tuple[str, ...]) -> list[float]:
    """Seconds of each step of ``mea train``, from its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        quiet = ["--quiet", "--sample-every=0", "--evaluation-windows=1", f"--evaluate-every={steps}"]
        command = [sys.executable, "-m", "memory_efficient_attention_pytorch", "train", f"--data={data}"]
        command += [*quiet, f"--checkpoint-every={steps}", f"--steps={steps}", f"--positions={OPTIONS.positions}"]
        subprocess.run([*command, f"--out={out}", *options], check=True)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return seconds_of([r for r in records if "gradient_norm" in r])


def seconds_of(steps: list[dict[str, Any]]) -> list[float]:
    """Seconds of each step, from the metrics' tokens per second, of which nine tenths are the value before."""
    tokens = OPTIONS.batch_size * OPTIONS.seq_len
    smoothed = [tokens / step["tokens_per_second"] for step in steps]
    pairs = itertools.pairwise(smoothed)
    return smoothed[:1] + [10 * now - 9 * before for before, now in pairs]


def measure(way: str, data: Path, steps: int) -> float:
    """Tokens per second."""
    if way == PLAIN:
        command = [sys.executable, __file__, "--plain", str(data), "--steps", str(steps)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    else:
        found = trained(data, steps, WAYS[way])
    return OPTIONS.batch_size * OPTIONS.seq_len / statistics.median(found[SKIPPED:])


def write_text(path: Path) -> None:
    """The text: some Python sources of the standard library, 4 MB, no network."""
    with path.open("wb") as file:
        for source in sorted(Path(os.__file__).parent.glob("*.py")):
            file.write(source.read_bytes())


def report(record: dict[str, Any]) -> str:
    rates = record["tokens_per_second"]
    rows = [
        [
            way,
            f"{statistics.median(rates[way]):,.0f}",
            f"{statistics.median(a / b for a, b in zip(rates[way], rates[PLAIN], strict=True)):.2f}",
        ]
        for way in rates
    ]
    return (
        f"The default size of `mea train` ({OPTIONS.depth} layers of {OPTIONS.dim}, {OPTIONS.heads} heads, "
        f"{OPTIONS.batch_size} × {OPTIONS.seq_len} tokens, bytes, learned positions), fp32; each in a fresh process, "
        f"in turn, {record['rounds']} rounds of {record['steps']} steps: medians. {describe_provenance(record)}.\n\n"
        + table(["", "tokens/s", "÷ plain loop"], rows)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain(options.plain, options.steps)))
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that measure
    rates: dict[str, list[float]] = {way: [] for way in (PLAIN, *WAYS)}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "text.txt"
        write_text(data)
        for _ in range(options.rounds):
            for way, found in rates.items():
                found.append(measure(way, data, options.steps))
                print(f"{found[-1]:10,.0f} tokens/s  {way}", flush=True)
    record = provenance() | {"threads": options.threads, "rounds": options.rounds, "steps": options.steps}
    record["tokens_per_second"] = rates
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "training.json", json.dumps(record, indent=1) + "\n")
    write_atomically(options.output / "training.md", report(record))
    print(report(record))


if __name__ == "__main__":
    main()
