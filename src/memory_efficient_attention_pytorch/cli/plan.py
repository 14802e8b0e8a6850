"""Say before a run what memory a training step of a Transformer needs, on this machine or for another, GPU or not; and
from a budget, the fastest settings that fit. Nothing is computed: the real code runs on tensors without contents.

  mea plan --dim 512 --depth 24 --seq-len 1048576 --device cuda
  mea plan --dim 512 --depth 24 --seq-len 65536 --budget 8GiB         settings that fit
  mea plan --dim 512 --depth 24 --budget 24GB --longest               the longest sequence that fits
  mea plan --seq-len 8192 --plot memory.png                           a picture over the step

The exit status is 1 where a budget is not kept.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parser import Switch

if TYPE_CHECKING:
    from ..planner import Plan

_SETTINGS = ("reversible", "exact", "keep_attention", "ff_chunks", "head_chunks", "loss_chunk_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mea plan [options]"
    model = parser.add_argument_group("model")
    for name, default, help in (
        ("dim", 512, "width"),
        ("depth", 6, "number of blocks"),
        ("heads", 8, "attention heads"),
        ("dim-head", 64, "width of one head"),
        ("ff-mult", 4, "width of the feed-forward's hidden layer, in units of dim"),
        ("num-tokens", 256, "size of the vocabulary"),
    ):
        model.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{help} (%(default)s)")
    model.add_argument("--kv-heads", type=int, metavar="N", help="key and value heads, a divisor of heads (heads)")
    model.add_argument("--window", type=int, metavar="N", help="tokens before it that a token sees (all)")
    model.add_argument(
        "--positions", default="rotary", metavar="KIND", help="rotary, learned, alibi, none (%(default)s)"
    )
    model.add_argument("--dropout", type=float, default=0.0, metavar="X", help="of attention weights (%(default)s)")
    model.add_argument("--tie-embeddings", action="store_true", help="the token embedding is the output layer's weight")
    model.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True, help="default: causal")
    step = parser.add_argument_group("training step")
    step.add_argument("--seq-len", type=int, default=8192, metavar="N", help="tokens in a sequence (%(default)s)")
    step.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences (%(default)s)")
    step.add_argument("--optimizer", default="adamw", metavar="NAME", help="adamw, adam, sgd, … or none (%(default)s)")
    types = ("fp32", "bf16", "fp16")
    step.add_argument("--dtype", default="fp32", choices=types, help="of the parameters (%(default)s)")
    step.add_argument("--precision", default="fp32", choices=types, help="of mixed precision; fp32: off (%(default)s)")
    step.add_argument("--device", metavar="NAME", help="cpu or cuda, here or not (default: what is here)")
    step.add_argument(
        "--keep-gradients",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="they exist when the step begins, as when accumulated; --no-…: as after zero_grad() (default: they do)",
    )
    settings = parser.add_argument_group("settings, which a budget chooses where they are not given")
    settings.add_argument("--reversible", action=argparse.BooleanOptionalAction, help="rebuild activations")
    settings.add_argument("--exact", action=argparse.BooleanOptionalAction, help="rebuild them bit for bit")
    settings.add_argument(
        "--keep-attention",
        action=Switch,
        choices=("cpu",),
        help="keep attention's outputs for backward; cpu: in host memory",
    )
    settings.add_argument("--ff-chunks", type=int, metavar="N", help="pieces of the feed-forward")
    settings.add_argument("--head-chunks", type=int, metavar="N", help="groups of heads")
    settings.add_argument("--loss-chunk-size", type=int, metavar="N", help="tokens whose logits exist at once")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--budget", metavar="SIZE", help="8GiB, 8GB, 8000M, …, or auto: what is free here")
    asked.add_argument("--generate", action="store_true", help="plan the pass over a prompt and a new token instead")
    asked.add_argument("--longest", action="store_true", help="find the longest sequence within the budget")
    asked.add_argument("--plot", metavar="FILE", help="write a picture (PNG) of the step's memory")
    asked.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from ..planner import available_memory, max_seq_len, plan

    config = _config(args)
    step = {
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "autocast": None if args.precision == "fp32" else args.precision,
        "device": args.device,
        "optimizer": None if args.optimizer == "none" else args.optimizer,
        "training": not args.generate,
        "keep_gradients": args.keep_gradients,
    }
    if args.longest and args.budget is None:
        raise ValueError("--longest needs a --budget, such as 8GiB or auto")
    budget = args.budget
    if budget == "auto":
        device = args.device or str(plan({**config, "depth": 1}, **{**step, "seq_len": 16}).device)
        budget = _free(available_memory, device)
    made = plan(config, seq_len=args.seq_len, budget=budget, **step)
    longest = max_seq_len({**config, **made.settings}, budget=budget, **step) if args.longest else None
    picture = _draw(made, args.plot) if args.plot else None
    if args.json:
        print(json.dumps({"config": config, **made.as_dict(), "longest": longest}, indent=2))
    else:
        _print(config, args, made, longest)
        if picture is not None:
            print(f"\npicture: {picture}")
    return 1 if made.budget is not None and not made.fits() else 0


def _config(args: argparse.Namespace) -> dict[str, Any]:
    names = ("num_tokens", "dim", "depth", "heads", "dim_head", "ff_mult", "kv_heads", "positions", "dropout", "causal")
    config = {name: getattr(args, name) for name in (*names, "tie_embeddings")}
    if args.window is not None:
        config["window"] = (args.window, 0) if args.causal else args.window
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.budget is None and args.precision != "fp32" and args.reversible is not False:
        given.setdefault("exact", True)  # as mea train does
    return config | given


def _free(available_memory: Any, device: str) -> int:
    try:
        return available_memory(device)
    except NotImplementedError as error:
        raise ValueError(f"--budget: {error}") from error


def _draw(made: "Plan", file: str) -> Path:
    from ..planner.figures import draw

    if not Path(file).name:
        raise ValueError(f"--plot: expected the name of a file, got {file!r}")
    try:
        return draw(made, file)
    except ModuleNotFoundError as error:
        raise ValueError(f"--plot: {error}; pip install matplotlib") from error
    except OSError as error:
        raise ValueError(f"--plot: cannot write to {file}: {error.strerror}") from error


def _print(config: dict[str, Any], args: argparse.Namespace, made: "Plan", longest: int | None) -> None:
    from ..planner import format_size

    kind = "causal Transformer" if config["causal"] else "Transformer"
    print(f"{kind} of {config['depth']} blocks, {config['dim']} wide, {config['heads']} heads of {config['dim_head']},")
    doing = "generating after" if args.generate else f"trained with {args.optimizer} on"
    print(f"{doing} {made.batch_size} × {made.seq_len:,} tokens, device {made.device}")
    print(f"\n{'needs at its peak':<22}{format_size(made.peak_bytes):>10}   in the {made.peak.describe()}")
    for category, nbytes in made.breakdown.items():
        print(f"  {category:<20}{format_size(nbytes):>10}{nbytes / made.peak_bytes:>7.0%}")
    print(f"{'computes':<22}{made.flops / 1e12:>10,.4g}   TFLOP a step")
    if len(made.options) > 1:
        _print_options(made)
    used = {**config, **made.settings}
    settings = {name: used[name] for name in _SETTINGS if name in used}
    if settings:
        print("\nsettings: " + ", ".join(f"{name}={value}" for name, value in settings.items()))
    if made.budget is not None:
        room = made.budget - made.peak_bytes
        verdict = f"fits, with {format_size(room)} to spare" if room >= 0 else f"is {format_size(-room)} too large"
        print(f"\nbudget {format_size(made.budget)}: {verdict}")
        if made.advice:
            print(made.advice)
            if settings.get("reversible", True) and not settings.get("keep_attention"):
                print(
                    "(offloading would save nothing: these settings keep neither activations nor attention's outputs)"
                )
    if longest is not None:
        print(f"longest sequence within the budget: {longest:,} tokens")


def _print_options(made: "Plan") -> None:
    from ..planner import format_size

    print(f"\n{'from the fastest on':<34}{'needs':>10}{'saves':>11}{'computes':>10}")
    before = made.options[0]
    for option in made.options:
        saved = "" if option is before else format_size(before.peak_bytes - option.peak_bytes)
        more = f"{option.flops / made.options[0].flops - 1:+.0%}"
        print(f"  {option.name:<32}{format_size(option.peak_bytes):>10}{saved:>11}{more:>10}")
        before = option
