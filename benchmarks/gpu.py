"""The CUDA suite, attention beside PyTorch's kernels and FlexAttention, and steps of a model at 64k to 1M tokens.

    PYTHONPATH=src python benchmarks/gpu.py [--minutes 9] [--output benchmarks/results/gpu]
    PYTHONPATH=src python benchmarks/gpu.py --device cpu        a tiny run, to try the script

Needs PyTorch alone. Writes a JSON file and a table, after each line anew, so that a run cut short leaves what it found.
What the time no longer allows, and what somebody's kernel refuses, stands in them with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_efficient_attention_pytorch import (
    AlibiBias,
    Transformer,
    __version__,
    dot_product_attention,
    select_backend,
)

ROOT = Path(__file__).resolve().parents[1]
COMPILING = 60.0  # seconds that FlexAttention may take for a case, to begin with
FIRST_STEP = 30.0  # seconds that the shortest step may take
MOST_STEP_GROWTH = 1.2  # of the time of a step beyond the square of its length


class Size(NamedTuple):
    """What is measured: attention of ``(1, heads, tokens, width)``, and steps of ``step_tokens``."""

    heads: int
    tokens: int
    width: int
    window: int
    document: int
    step_tokens: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    rounds: int


LARGE = Size(8, 16384, 64, 1024, 3000, (2**16, 2**18, 2**20), 512, torch.bfloat16, 5)
TINY = Size(2, 256, 16, 32, 100, (256, 512), 32, torch.float32, 1)

Call = Callable[..., Tensor]


class Case(NamedTuple):
    """``ours``: keywords of our function. ``sdpa``: makes PyTorch's, its mask already built. ``mask_mod``,
    ``score_mod``: FlexAttention's, None where it has none. ``bias``: what wants a gradient besides q, k and v."""

    ours: dict[str, Any]
    sdpa: Callable[[], Call]
    mask_mod: Callable[..., Tensor] | None = None
    score_mod: Callable[..., Tensor] | None = None
    bias: Tensor | None = None
    flex: bool = True


def cases(size: Size, device: str) -> Iterator[tuple[str, Case]]:
    n, places = size.tokens, torch.arange(size.tokens, device=device)

    def plain(**arguments: Any) -> Callable[[], Call]:
        return lambda: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **arguments)

    def masked(visible: Callable[..., Tensor]) -> Callable[[], Call]:
        def made() -> Call:
            mask = visible(0, 0, places[:, None], places[None])
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)

        return made

    def causal(_b: Any, _h: Any, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def near(_b: Any, _h: Any, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= size.window)

    ids = places // size.document

    def documents(_b: Any, _h: Any, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (ids[i] == ids[j])

    slopes = 2.0 ** (-8.0 * torch.arange(1, size.heads + 1, device=device) / size.heads)

    def alibi(score: Tensor, _b: Any, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j).abs()

    def alibi_mask() -> Call:
        distance = (places[:, None] - places[None]).abs().to(size.dtype)
        bias = (-slopes.to(size.dtype)[:, None, None] * distance).masked_fill(places[:, None] < places, float("-inf"))
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias[None])

    yield "plain", Case({}, plain())
    yield "causal", Case({"causal": True}, plain(is_causal=True), causal)
    yield "window", Case({"causal": True, "window": (size.window, 0)}, masked(near), near)
    yield "documents", Case({"causal": True, "document_ids": ids[None]}, masked(documents), documents)
    yield "alibi", Case({"causal": True, "attn_bias": AlibiBias(size.heads)}, alibi_mask, causal, alibi)
    yield "dropout", Case({"causal": True, "dropout": 0.1}, plain(is_causal=True, dropout_p=0.1), flex=False)
    bias = torch.randn(1, size.heads, n, n, device=device, dtype=size.dtype).requires_grad_()

    def biased(score: Tensor, _b: Any, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, h, i, j]

    yield "bias gradient", Case({"attn_bias": bias}, plain(attn_mask=bias), None, biased, bias)


def by_flex(case: Case, size: Size, device: str) -> Call:
    """FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, mask = size.tokens, None
    if case.mask_mod is not None:
        mask = create_block_mask(case.mask_mod, None, None, n, n, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, score_mod=case.score_mod, block_mask=mask)


class Clock:
    """The time that is left, and how long what runs on the device takes."""

    def __init__(self, device: str, minutes: float) -> None:
        self.cuda, self.end = device != "cpu", time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def seconds(self, work: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def peak(self, work: Callable[[], Any]) -> int | None:
        """Bytes beyond what was there before; None on a CPU."""
        if not self.cuda:
            work()
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def measured(make: Callable[[], Callable[[], Any]], clock: Clock, rounds: int, expected: float) -> dict[str, Any]:
    """Milliseconds, the median of some rounds, and peak bytes; or why there are none."""
    if clock.left < expected:
        return {"left_out": "the time is used up"}
    try:
        work = make()
        work()  # compiles, and fills the allocator
        peak = clock.peak(work)
        times = [clock.seconds(work) for _ in range(rounds)]
    except Exception as error:  # whatever a kernel or a compiler says belongs into the table
        first = str(error).strip().partition("\n")[0]
        return {"left_out": f"{type(error).__name__}: {first[:160]}"}
    return {"milliseconds": 1000 * statistics.median(times), "peak_bytes": peak}


def forward_and_backward(call: Call, leaves: list[Tensor], bias: Tensor | None) -> Callable[[], Any]:
    wanted, cotangent = [*leaves, *([] if bias is None else [bias])], torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(call(*leaves), wanted, cotangent)


def way_of(leaves: list[Tensor], case: Case) -> str:
    try:
        return select_backend(*leaves, **case.ours).way
    except Exception as error:
        return type(error).__name__


def attention(size: Size, device: str, clock: Clock, report: Callable[[dict[str, Any]], None]) -> None:
    shape = (1, size.heads, size.tokens, size.width)
    leaves = [torch.randn(shape, device=device, dtype=size.dtype, requires_grad=True) for _ in range(3)]
    compiling = COMPILING
    for name, case in cases(size, device):
        line: dict[str, Any] = {"case": name, "way": way_of(leaves, case)}
        calls: dict[str, Callable[[], Call]] = {
            "ours": lambda case=case: lambda q, k, v: dot_product_attention(q, k, v, **case.ours),
            "sdpa": case.sdpa,
        }
        if case.flex and device != "cpu":  # whose CPU kernels have no backward
            calls["flex"] = lambda case=case: by_flex(case, size, device)
        for system, make in calls.items():
            before = clock.left
            work = lambda make=make, case=case: forward_and_backward(make(), leaves, case.bias)  # noqa: E731
            line[system] = measured(work, clock, size.rounds, compiling if system == "flex" else 5.0)
            if system == "flex":
                compiling = min(compiling, before - clock.left) + 10
        report(line)


def steps(size: Size, device: str, clock: Clock, report: Callable[[dict[str, Any]], None]) -> None:
    """Forward and backward of a model of two layers with its loss, under autocast."""
    torch.manual_seed(0)
    longest, vocabulary = max(size.step_tokens), 256
    shape = {"dim": size.dim, "depth": 2, "heads": size.dim // 64 or 2, "dim_head": min(64, size.dim // 2)}
    model = Transformer(num_tokens=vocabulary, max_seq_len=longest, causal=True, positions="rotary", **shape).to(device)
    seconds, before, warmed_up = 0.0, 0, False
    for tokens in (min(1024, *size.step_tokens), *size.step_tokens):
        x = torch.randint(vocabulary, (1, tokens + 1), device=device)

        def work(x: Tensor = x) -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                loss = model(x[:, :-1], labels=x[:, 1:])
            loss.backward()

        # Once is enough for long ones: what compiles and what is loaded did so in the first.
        expected = MOST_STEP_GROWTH * seconds * (tokens / before) ** 2 if before else FIRST_STEP
        line: dict[str, Any] = {"tokens": tokens}
        if clock.left < expected:
            report(line | {"left_out": f"some {expected:.0f} s more would be needed"})
            continue
        try:
            peaks: list[int | None] = []
            seconds = clock.seconds(lambda work=work, peaks=peaks: peaks.append(clock.peak(work)))
        except Exception as error:  # not enough memory, or whatever else a kernel says
            report(line | {"left_out": f"{type(error).__name__}: {str(error).partition('. ')[0][:160]}"})
            break
        if warmed_up:
            report(line | {"seconds": seconds, "peak_bytes": peaks[0]})
            before = tokens
        warmed_up = True


def suite(clock: Clock) -> dict[str, Any]:
    """The CUDA tests in a process of their own, of which no memory stays."""
    if importlib.util.find_spec("pytest") is None:
        return {"left_out": "pytest is not installed"}
    # The project's options may need plugins, and its filters make a CUDA library's warning an error.
    options = ["-m", "gpu", "-q", "-W", "default", "--noconftest", "-p", "no:cacheprovider", "tests/gpu"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    command = [sys.executable, "-m", "pytest", *options]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1.0, clock.left / 2)
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": "half of the time was not enough"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing was printed"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "summary": lines[-1], "failed": failed}


def describe_machine(device: str) -> dict[str, Any]:
    """What the package's own description holds, whose room needs more than PyTorch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.exists() else []
    facts = dict(line.partition(":")[::2] for line in lines)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    of_processor = (facts.get(key, "unknown") for key in ("model name", "cpu family", "model"))
    machine: dict[str, Any] = {"processor": "{}, family {}, model {}".format(*of_processor), "cores": os.cpu_count()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return machine


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = found["machine"]
    on = machine.get("gpu") or machine["processor"]
    lines = [f"# {on}, {found['date']}", "", ", ".join(f"{k} {v}" for k, v in found["versions"].items()), ""]
    if found["suite"]:
        lines += [f"CUDA tests: {found['suite'].get('summary') or found['suite']['left_out']}", ""]
    lines += [f"Attention, forward and backward of {found['attention_of']}: milliseconds, peak MiB", ""]
    lines += ["| case | ours | our way | PyTorch | FlexAttention |", "|---|---|---|---|---|"]
    lines += [
        f"| {x['case']} | {_cell(x['ours'])} | {x['way']} | {_cell(x['sdpa'])} | {_cell(x.get('flex'))} |"
        for x in found["attention"]
    ]
    lines += ["", "| tokens of a step | seconds | peak MiB |", "|---|---|---|"]
    for x in found["steps"]:
        told = x.get("left_out") or f"{x['seconds']:.2f}"
        lines.append(f"| {x['tokens']} | {told} | {_mebibytes(x.get('peak_bytes'))} |")
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    if "left_out" in result:
        return result["left_out"].replace("|", "/")
    return f"{result['milliseconds']:.2f}, {_mebibytes(result['peak_bytes'])}"


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny run without the tests")
    parser.add_argument("--minutes", type=float, default=9.0, help="about how long all of it may take")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu: PyTorch finds no CUDA device here; nothing was run", file=sys.stderr)
        return 1
    size, clock = LARGE if args.device == "cuda" else TINY, Clock(args.device, args.minutes)
    now = datetime.datetime.now(datetime.UTC)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ours": __version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    found: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "machine": describe_machine(args.device),
        "versions": versions,
        "attention_of": f"1 × {size.heads} × {size.tokens} × {size.width}, {str(size.dtype).removeprefix('torch.')}",
        "suite": {},
        "attention": [],
        "steps": [],
    }
    path = args.output / f"{now:%Y-%m-%d-%H%M%S}-{args.device}.json"

    def save() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found, indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), table(found))

    def report(kind: str) -> Callable[[dict[str, Any]], None]:
        def add(line: dict[str, Any]) -> None:
            found[kind].append(line)
            save()
            print(json.dumps(line), flush=True)

        return add

    if args.device == "cuda":
        found["suite"] = suite(clock)
        print(json.dumps(found["suite"]), flush=True)
        save()
    # Steps first: what a case leaves compiled is of no use to them, and a case less is missed less than a million.
    failed = False
    for kind, measure in (("steps", steps), ("attention", attention)):
        try:
            measure(size, args.device, clock, report(kind))
        except Exception as error:  # the other is measured, and what was found is there
            failed = True
            print(f"gpu: {kind} ended early: {type(error).__name__}: {error}", file=sys.stderr)
    save()
    print(f"{table(found)}\n{path}")
    return 1 if failed or not found["suite"].get("passed", True) else 0


if __name__ == "__main__":
    sys.exit(main())
