"""Say before a run what memory a training step of a Transformer needs, on this machine or for another, GPU or not; and
from a budget, the fastest settings that fit. Nothing is computed: the real code runs on tensors without contents.
Without options it is the model and the batch of `mea train`.

  mea plan --dim 512 --depth 24 --seq-len 1048576 --batch-size 1 --device cuda
  mea plan --dim 512 --depth 24 --seq-len 65536 --budget 8GiB         settings that fit
  mea plan --dim 512 --depth 24 --budget 24GB --longest               the longest sequence that fits
  mea plan --seq-len 8192 --plot memory.png                           a picture over the step

The exit status is 1 where a budget is not kept.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.config import KNOBS, SETTINGS, TransformerConfig
from ..training.config import TrainConfig, known_keys
from .parser import add_options, given_options

if TYPE_CHECKING:
    from ..planner import Plan

_MODEL = [name for name in known_keys() if name in KNOBS and name not in SETTINGS]
_STEP = ("seq_len", "batch_size")
_OWN = {"num_tokens": 256, "causal": True}
"""What `mea train` has no option for, as in its default run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mea plan [options]"
    model = parser.add_argument_group("model")
    add_options(model, TrainConfig, _MODEL)
    add_options(model, TransformerConfig, _OWN, _OWN)
    step = parser.add_argument_group("training step")
    add_options(step, TrainConfig, _STEP)
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
    add_options(settings, TransformerConfig, SETTINGS, {"exact": "under mixed precision"})
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--budget", metavar="SIZE", help="8GiB, 8GB, 8000M, …, or auto: what is free here")
    asked.add_argument("--generate", action="store_true", help="plan the pass over a prompt and a new token instead")
    asked.add_argument("--longest", action="store_true", help="find the longest sequence within the budget")
    asked.add_argument("--plot", metavar="FILE", help="write a picture (PNG) of the step's memory")
    asked.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from ..planner import available_memory, max_seq_len, plan

    config, size = _config(args), _given(args, _STEP)
    step: dict[str, Any] = {
        "batch_size": size["batch_size"],
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
    made = plan(config, seq_len=size["seq_len"], budget=budget, **step)
    longest = max_seq_len({**config, **made.settings}, budget=budget, **step) if args.longest else None
    picture = _draw(made, args.plot) if args.plot else None
    if args.json:
        print(json.dumps({"config": config, **made.as_dict(), "longest": longest}, indent=2))
    else:
        _print(config, args, made, longest)
        if picture is not None:
            print(f"\npicture: {picture}")
    return 1 if made.budget is not None and not made.fits() else 0


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """What was given and else `mea train`'s default."""
    return {name: getattr(TrainConfig, name) for name in names} | given_options(args, names)


def _config(args: argparse.Namespace) -> dict[str, Any]:
    config = _given(args, _MODEL) | _OWN | given_options(args, (*_OWN, *SETTINGS))
    if config["window"] is not None and config["causal"]:
        config["window"] = (config["window"], 0)
    if args.budget is None and args.precision != "fp32" and config.get("reversible", True):
        config.setdefault("exact", True)  # as mea train does
    return config


def _free(available_memory: Any, device: str) -> int:
    try:
        return int(available_memory(device))
    except NotImplementedError as error:
        raise ValueError(f"--budget: {error}") from error


def _draw(made: "Plan", file: str) -> Path:
    from .plan_picture import draw

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
    settings = {name: used[name] for name in SETTINGS if name in used}
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
