"""How close the planner's predictions are to what training steps really take on this machine's CPU.

  python benchmarks/planner_accuracy.py               predict and measure the reported set; write the table
  python benchmarks/planner_accuracy.py --calibrate   the same for the calibration set, which the table never contains
  python benchmarks/planner_accuracy.py --operators   what single operators allocate for themselves
  python benchmarks/planner_accuracy.py --limits      the longest sequence within a budget, run under that budget
  python benchmarks/planner_accuracy.py --models      models of transformers, before and after make_memory_efficient

A measurement is the rise of a fresh process's high-water resident set during the step, added to the bytes of what
exists before it (parameters, gradients, optimizer state), which are known exactly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.benchmarking.measure import measure_peak, zero_grads
from memory_efficient_attention_pytorch.benchmarking.results import describe_machine
from memory_efficient_attention_pytorch.planner import format_size, max_seq_len, parse_size, plan
from memory_efficient_attention_pytorch.planner.plan import DTYPES
from memory_efficient_attention_pytorch.planner.step import OPTIMIZERS

RESULTS = Path(__file__).parent / "results" / "planner-accuracy"
STATE = ("parameters", "gradients", "optimizer")
BASE = {"batch_size": 1, "seq_len": 4096, "dim": 256, "depth": 4, "heads": 4, "num_tokens": 256, "causal": True}
STEP_KEYWORDS = ("batch_size", "seq_len", "dtype", "autocast", "optimizer", "kind")

# The allowances in the planner were set by looking at these, and at nothing in REPORTED.
CALIBRATION: list[dict[str, Any]] = [
    {"seq_len": 8192, "depth": 3},
    {"dim": 512, "depth": 2, "heads": 8, "head_chunks": 4, "ff_chunks": 8},
    {"depth": 3, "num_tokens": 24000},
    {"depth": 3, "window": 256, "reversible": False},
    {"dim": 384, "heads": 6, "positions": "rotary", "ff_chunks": 4, "optimizer": "sgd"},
    {"dim": 512, "depth": 2, "heads": 8, "autocast": "bf16", "exact": True, "head_chunks": 2},
    {"dim": 512, "depth": 2, "heads": 8, "dtype": "bf16", "ff_chunks": 4},
    {"batch_size": 4, "seq_len": 1024, "depth": 5, "reversible": False, "autocast": "bf16"},
    {"kind": "encoder", "seq_len": 2048, "depth": 2},
    {"kind": "gpt2", "seq_len": 1024, "depth": 3, "num_tokens": 8000},
]

REPORTED: list[dict[str, Any]] = [
    {},
    {"depth": 12},
    {"depth": 12, "reversible": False},
    {"seq_len": 16384, "dim": 128, "depth": 2, "heads": 2},
    {"seq_len": 1024, "dim": 768, "depth": 3, "heads": 12},
    {"batch_size": 8, "seq_len": 1024},
    {"batch_size": 3, "seq_len": 1500, "head_chunks": 2, "ff_chunks": 5},
    {"dim": 512, "heads": 8, "depth": 2},
    {"dim": 512, "heads": 8, "depth": 3, "head_chunks": 8, "ff_chunks": 16},
    {"dim": 512, "heads": 8, "depth": 2, "head_chunks": 2, "ff_chunks": 4, "positions": "rotary"},
    {"dim": 320, "heads": 5, "ff_mult": 2, "depth": 3},
    {"dim": 256, "heads": 8, "dim_head": 32, "kv_heads": 2, "depth": 3},
    {"num_tokens": 32000, "depth": 2},
    {"num_tokens": 32000, "depth": 2, "tie_embeddings": True, "head_chunks": 4, "ff_chunks": 8},
    {"num_tokens": 32000, "depth": 2, "loss_chunk_size": 4096},
    {"num_tokens": 8000, "depth": 3, "optimizer": None},
    {"num_tokens": 8000, "depth": 3, "optimizer": "sgd", "reversible": False},
    {"window": 256},
    {"window": 128, "dim": 512, "heads": 8, "depth": 2, "ff_chunks": 8, "head_chunks": 2},
    {"window": 512, "reversible": False, "positions": "rotary"},
    {"causal": False, "head_chunks": 2, "ff_chunks": 8},
    {"seq_len": 2048, "dropout": 0.1, "depth": 2},
    {"seq_len": 2048, "dropout": 0.1, "depth": 3, "reversible": False},
    {"seq_len": 3000, "positions": "alibi", "depth": 2, "ff_chunks": 8},
    {"positions": "none", "depth": 6, "ff_chunks": 16},
    {"dim": 512, "heads": 8, "depth": 2, "exact": True},
    {"dim": 512, "heads": 8, "depth": 3, "autocast": "bf16", "exact": True, "ff_chunks": 8},
    {"seq_len": 8192, "autocast": "bf16", "exact": True, "head_chunks": 4, "ff_chunks": 8},
    {"dim": 512, "heads": 8, "depth": 3, "autocast": "bf16", "reversible": False},
    {"num_tokens": 16000, "autocast": "bf16", "exact": True, "depth": 3},
    {"dim": 512, "heads": 8, "depth": 4, "dtype": "bf16"},
    {"dim": 512, "heads": 8, "seq_len": 8192, "depth": 2, "dtype": "bf16", "head_chunks": 4, "ff_chunks": 8},
    {"dtype": "bf16", "depth": 6, "reversible": False, "window": 256},
    {"kind": "encoder", "seq_len": 3000, "depth": 4},
    {"kind": "encoder", "seq_len": 1024, "batch_size": 4, "dim": 512, "heads": 8, "depth": 2, "autocast": "bf16"},
    {"kind": "gpt2", "seq_len": 1536, "depth": 6, "dim": 384, "heads": 6, "num_tokens": 256},
    {"kind": "gpt2", "seq_len": 1024, "batch_size": 3, "depth": 2, "num_tokens": 16000, "optimizer": "sgd"},
]


# Budgets, and what is to fit in them with as long a sequence as possible.
LIMITED: list[tuple[str, dict[str, Any]]] = [
    ("400MiB", {"depth": 3, "positions": "rotary", "window": 512, "ff_chunks": 8, "head_chunks": 2}),
    ("500MB", {"depth": 2, "reversible": False, "positions": "alibi", "window": 256}),
    ("600MiB", {"dim": 512, "heads": 8, "positions": "none", "window": 512, "autocast": "bf16", "exact": True}),
    ("400MiB", {"num_tokens": 16000, "depth": 2, "positions": "none", "window": 512, "batch_size": 2}),
]


class Encoder(nn.Module):
    """PyTorch's own Transformer layers between an embedding and a linear layer."""

    def __init__(self, num_tokens: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(num_tokens, dim)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, num_tokens)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.layers(self.embedding(x)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_model(kind: str, seq_len: int, **keywords: Any) -> nn.Module:
    """A language model that returns its loss (or has it as an attribute) for tokens and labels."""
    if kind == "transformer":
        return Transformer(max_seq_len=seq_len, **keywords)
    keywords.pop("causal")
    if kind == "encoder":
        return Encoder(**keywords)
    from transformers import GPT2Config, GPT2LMHeadModel

    names = {"dim": "n_embd", "depth": "n_layer", "heads": "n_head", "num_tokens": "vocab_size"}
    named = {names[name]: value for name, value in keywords.items()}
    return GPT2LMHeadModel(
        GPT2Config(n_positions=seq_len, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **named)
    )


def split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is the step's and what the model's."""
    whole = {"kind": "transformer", "dtype": "fp32", "autocast": None, "optimizer": "adamw", **BASE, **config}
    step = {name: whole.pop(name) for name in STEP_KEYWORDS}
    return step, whole


def build(config: dict[str, Any]) -> Callable[[], None]:
    """The real model with gradients and optimizer state, and its step; the target of ``measure_peak``."""
    how, keywords = split(config)
    torch.manual_seed(0)
    model = make_model(how["kind"], how["seq_len"], **keywords).to(DTYPES[how["dtype"]])
    zero_grads(model)
    optimizer = None if how["optimizer"] is None else OPTIMIZERS[how["optimizer"]](model.parameters(), lr=1e-3)
    tokens = torch.randint(keywords["num_tokens"], (how["batch_size"], how["seq_len"]))
    autocast = how["autocast"]

    def step(length: int) -> None:
        x = tokens[:, :length]
        with torch.autocast("cpu", DTYPES.get(autocast), enabled=autocast is not None):
            loss = _loss(model, x)
        loss.backward()
        if optimizer is not None:
            optimizer.step()

    step(16)  # loads what PyTorch loads on first use
    return lambda: step(how["seq_len"])


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, Transformer | Encoder):
        return model(x, labels=x)
    return model(input_ids=x, labels=x).loss


@dataclass(frozen=True)
class Row:
    config: dict[str, Any]
    predicted_bytes: int
    measured_bytes: int
    seconds: float

    @property
    def error(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def compare(config: dict[str, Any]) -> Row:
    how, keywords = split(config)
    options = {name: how[name] for name in ("batch_size", "seq_len", "dtype", "autocast", "optimizer")}
    if how["kind"] == "transformer":
        made = plan(keywords, device="cpu", **options)
    else:
        with torch.device("meta"):
            model = make_model(how["kind"], how["seq_len"], **keywords)
        tokens = torch.zeros(how["batch_size"], how["seq_len"], dtype=torch.long, device="meta")
        name = "x" if how["kind"] == "encoder" else "input_ids"
        made = plan(model, device="cpu", example_inputs={name: tokens, "labels": tokens}, **options)
    measured = measure_peak(f"{__file__}:build", {"config": config})
    state = made.timeline.breakdown(0)
    before = sum(state[part] for part in STATE)
    return Row(config, made.peak_bytes, before + measured.peak_bytes, measured.seconds)


def limits() -> Iterator[str]:
    """For each budget the longest sequence, and whether it and slightly longer ones run where no more can be had."""
    longer = (1.0, 1.01, 1.02, 1.03)
    ends = " | ".join(f"{factor - 1:+.0%}" for factor in longer[1:])
    yield f"| configuration | budget | longest sequence | takes | reserved | runs | {ends} |"
    yield "|---|---:|---:|---:|---:|" + "---|" * len(longer)
    for budget, config in LIMITED:
        how, keywords = split(config)
        options = {name: how[name] for name in ("batch_size", "dtype", "autocast", "optimizer")}
        longest = max_seq_len(keywords, budget=budget, device="cpu", **options)
        made = plan(keywords, seq_len=longest, device="cpu", **options)
        state = sum(made.timeline.breakdown(0)[part] for part in STATE)
        taken = measure_peak(f"{__file__}:build", {"config": {**config, "seq_len": longest}})
        room = parse_size(budget) - state + taken.reserved_bytes
        outcomes = [runs_within({**config, "seq_len": round(longest * factor)}, room) for factor in longer]
        cells = [describe({**config, "seq_len": longest}), format_size(parse_size(budget)), f"{longest:,}"]
        cells += [format_size(state + taken.peak_bytes), format_size(taken.reserved_bytes)]
        yield "| " + " | ".join([*cells, *("yes" if ran else "no" for ran in outcomes)]) + " |"


def runs_within(config: dict[str, Any], room: int) -> bool:
    """Return whether the step runs where the system refuses it more than ``room`` bytes."""
    try:
        measure_peak(f"{__file__}:build", {"config": config}, limit_bytes=room)
    except MemoryError:
        return False
    return True


def describe(config: dict[str, Any]) -> str:
    whole = {**BASE, **config}
    fixed = (
        f"{whole.get('kind', 'transformer')} {whole['batch_size']}×{whole['seq_len']} dim {whole['dim']} "
        f"depth {whole['depth']} heads {whole['heads']} vocabulary {whole['num_tokens']}"
    )
    rest = {k: v for k, v in config.items() if k not in (*BASE, "kind") or k == "causal"}
    return ", ".join([fixed, *(f"{k} {v}" for k, v in rest.items())])


def table(rows: list[Row]) -> Iterator[str]:
    yield "| configuration | predicted | measured | error |"
    yield "|---|---:|---:|---:|"
    for row in rows:
        sizes = f"{format_size(row.predicted_bytes)} | {format_size(row.measured_bytes)}"
        yield f"| {describe(row.config)} | {sizes} | {row.error:+.1%} |"
    errors = [row.error for row in rows]
    close = sum(abs(error) <= 0.05 for error in errors)
    yield ""
    yield (
        f"{len(rows)} configurations: {close} within 5 % ({close / len(rows):.0%}), "
        f"median {statistics.median(map(abs, errors)):.1%}, lowest {min(errors):+.1%}, highest {max(errors):+.1%}."
    )


HERE = describe_machine("cpu")
MACHINE = (
    f"{HERE['processor']}, {HERE['system']}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
    f"torch {torch.__version__}, on {date.today()}"
)
REPORT_HEAD = (
    "# What the planner predicted and what was measured",
    "",
    f"Made by `python benchmarks/planner_accuracy.py` on {MACHINE}.",
    "The figures are the peak of a training step with parameters, gradients and optimizer state. None of these",
    "configurations was looked at when the allowances for kernels were set.",
    "",
)
MODELS_HEAD = (
    "# Models of transformers: what the planner predicted and what was measured",
    "",
    f"Made by `python benchmarks/planner_accuracy.py --models` on {MACHINE}, transformers {version('transformers')}.",
    "Three layers 256 wide, 4 heads, vocabulary 8000, fp32, as their configurations make them; the peak of a training",
    "step with AdamW, its state and the model included. No allowance of the planner's was set by them.",
    "",
)
LIMITS_HEAD = (
    "# The longest sequence within a budget, where no more can be had",
    "",
    f"Made by `python benchmarks/planner_accuracy.py --limits` on {MACHINE}.",
    "`max_seq_len` gives the length. Its step *takes* what is measured without a limit, parameters, gradients and",
    "optimizer state included. It then *runs*, or not, in a process that the system refuses any more than the budget,",
    "and so do sequences slightly longer. What the system limits is address space: oneDNN *reserves* some for the",
    "kernels it compiles and never touches it, which is no memory and is granted on top.",
    "",
)


# One of grouped queries; one with positions and dropout, which makes its own attention n × n; one with windows.
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "GPT2": {},
    "Gemma3": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 512},
}
MODEL_LENGTHS = (1024, 2048, 4096)


def model_of_transformers(kind: str, seq_len: int) -> Any:
    import transformers

    shape: dict[str, Any]
    if kind == "GPT2":
        shape = {"n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": seq_len, "vocab_size": 8000}
        config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")
        return transformers.GPT2LMHeadModel(config).train()
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"vocab_size": 8000, "head_dim": 64, "max_position_embeddings": seq_len, "pad_token_id": 0}
    named = transformers.Gemma3TextConfig if kind == "Gemma3" else transformers.LlamaConfig
    return getattr(transformers, f"{kind}ForCausalLM")(named(**shape, **MODELS[kind])).train()


def build_model(kind: str, state: str, seq_len: int) -> Callable[[], None]:
    """The same as ``build`` of a model of transformers, in one of the states that are planned."""
    from memory_efficient_attention_pytorch.huggingface import make_memory_efficient, planning

    torch.manual_seed(0)
    model = model_of_transformers(kind, seq_len)
    if state == planning.CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if state == planning.EFFICIENT:
        make_memory_efficient(model)
    zero_grads(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(8000, (1, seq_len))

    def step(length: int) -> None:
        x = tokens[:, :length]
        model(input_ids=x, labels=x, use_cache=False).loss.backward()
        optimizer.step()

    step(16)  # loads what PyTorch loads on first use
    return lambda: step(seq_len)


def models() -> Iterator[str]:
    from memory_efficient_attention_pytorch.huggingface import make_memory_efficient

    yield "| model | state | tokens | predicted | measured | error |"
    yield "|---|---|---:|---:|---:|---:|"
    for kind, seq_len in itertools.product(MODELS, MODEL_LENGTHS):
        with torch.device("meta"):
            model = model_of_transformers(kind, seq_len)
        for state, made in make_memory_efficient(model).plan(seq_len=seq_len, device="cpu").plans.items():
            before = sum(made.timeline.breakdown(0)[part] for part in STATE)
            arguments = {"kind": kind, "state": state, "seq_len": seq_len}
            measured = before + measure_peak(f"{__file__}:build_model", arguments).peak_bytes
            sizes = f"{format_size(made.peak_bytes)} | {format_size(measured)}"
            row = f"| {kind} | {state} | {seq_len} | {sizes} | {made.peak_bytes / measured - 1:+.1%} |"
            print(row, flush=True)
            yield row


def write(name: str, *lines: str) -> None:
    print(*lines, sep="\n")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text("\n".join([*lines, ""]))


def operator(name: str, dtype: str, warm: bool) -> Callable[[], Any]:
    """One operator on real tensors, run once before if ``warm``; a target of ``measure_peak``."""
    arguments, call = OPERATORS[name](DTYPES[dtype])
    if warm:
        call(*arguments)
    return lambda: call(*arguments)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def _product(dtype: torch.dtype, transposed: bool) -> tuple[Any, Callable[..., Any]]:
    a, out = _random(4096, 1024, dtype=dtype), torch.zeros(4096, 512, dtype=dtype)
    if transposed:
        return (a, out, torch.zeros(1024, 512, dtype=dtype)), lambda a, b, out: torch.mm(a.t(), b, out=out)
    return (a, _random(1024, 512, dtype=dtype), out), lambda a, b, out: torch.mm(a, b, out=out)


def _attention(dtype: torch.dtype, backward: bool, head_major: bool = False) -> tuple[Any, Callable[..., Any]]:
    q, k, v = (_random(1, 4096, 8, 64, dtype=dtype).transpose(1, 2) for _ in range(3))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if not backward:
        return (q, k, v), lambda q, k, v: forward(q, k, v, 0.0, True)
    out, lse = forward(q, k, v, 0.0, True)
    gradient = torch.ones_like(out).contiguous() if head_major else torch.ones_like(out)
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return (gradient, q, k, v, out, lse), lambda *tensors: call(*tensors, 0.0, True)


OPERATORS: dict[str, Callable[[torch.dtype], tuple[Any, Callable[..., Any]]]] = {
    "matrix product": lambda dtype: _product(dtype, False),
    "matrix product, first operand transposed": lambda dtype: _product(dtype, True),
    "fused attention": lambda dtype: _attention(dtype, False),
    "its backward": lambda dtype: _attention(dtype, True),
    "its backward, gradient head-major": lambda dtype: _attention(dtype, True, True),
    "logsumexp of 64 Mi": lambda dtype: ((_random(8192, 8192, dtype=dtype),), lambda x: x.logsumexp(-1)),
    "sum of 16 Mi to fp32": lambda dtype: (
        (_random(4096, 4096, dtype=dtype),),
        lambda x: x.sum(0, dtype=torch.float32),
    ),
    "fp32 += of 16 Mi": lambda dtype: ((torch.zeros(4096, 4096), _random(4096, 4096, dtype=dtype)), Tensor.add_),
}


def measure_operators() -> None:
    """Print what each operator's peak is beyond its result: the first time, and when it ran before."""
    print(f"{'operator':<44}{'dtype':<8}{'result':>10}{'first':>12}{'again':>12}   beyond the result")
    for name in OPERATORS:
        for dtype in ("fp32", "bf16"):
            arguments, call = OPERATORS[name](DTYPES[dtype])
            given = {tensor.untyped_storage().data_ptr() for tensor in arguments}
            result = call(*arguments)
            made = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
            new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
            size = sum(nbytes for place, nbytes in new.items() if place not in given)
            del arguments, result, made
            target = f"{__file__}:operator"
            peaks = [measure_peak(target, {"name": name, "dtype": dtype, "warm": warm}) for warm in (False, True)]
            beyond = "".join(f"{format_size(peak.peak_bytes - size):>12}" for peak in peaks)
            print(f"{name:<44}{dtype:<8}{format_size(size):>10}{beyond}", flush=True)


def compare_all(
    configs: list[dict[str, Any]], compared: Callable[[dict[str, Any]], Row], only: list[int] | None
) -> list[Row]:
    """A row for each configuration, or those whose numbers are asked for, printed as it comes."""
    rows = []
    for number, config in enumerate(configs):
        if only and number not in only:
            continue
        rows.append(row := compared(config))
        difference = (row.predicted_bytes - row.measured_bytes) / 2**20
        print(
            f"{number:2} {row.error:+6.1%} {difference:+7.1f} MiB {row.seconds:5.1f} s  {describe(config)}", flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of configurations; nothing is written")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--models", action="store_true")
    arguments = parser.parse_args()
    if arguments.operators:
        measure_operators()
        return
    if arguments.models:
        write("models.md", *MODELS_HEAD, *models())
        return
    if arguments.limits:
        write("limits.md", *LIMITS_HEAD, *limits())
        return
    configs = CALIBRATION if arguments.calibrate else REPORTED
    rows = compare_all(configs, compare, arguments.only)
    if arguments.only or arguments.calibrate:
        print(*table(rows), sep="\n")
        return
    write("report.md", *REPORT_HEAD, *table(rows))
    (RESULTS / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
