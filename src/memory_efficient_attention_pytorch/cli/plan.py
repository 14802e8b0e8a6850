"""Predict the memory that a training step of a Transformer needs, on this machine or on another, CPU or GPU; given a
budget, choose the fastest settings that fit. Nothing is computed: the real code runs on tensors without contents.
The default is the model and the batch of `mea train`.

  mea plan --dim 512 --depth 24 --seq-len 1048576 --batch-size 1 --device cuda
  mea plan --dim 512 --depth 24 --seq-len 65536 --budget 8GiB
      settings that fit
  mea plan --dim 512 --depth 24 --budget 24GB --longest
      the longest sequence that fits
  mea plan --seq-len 8192 --plot memory.png
      a picture over the step
  mea plan --model DIRECTORY --seq-len 8192 --budget 24GB
      a model of Hugging Face transformers, before and after
      make_memory_efficient

The exit status is 1 if the step does not fit in the budget.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import brought_by
from ..models.config import KNOBS, SETTINGS, TransformerConfig
from ..training.config import TrainConfig, check_sizes, known_keys
from .parser import add_options, given_options
from .terminal import fitted

if TYPE_CHECKING:
    from ..huggingface.change import Report
    from ..huggingface.planning import StepPlans
    from ..planner import Plan

_MODEL = [name for name in known_keys() if name in KNOBS and name not in SETTINGS]
_STEP = ("seq_len", "batch_size")
_OWN = {"num_tokens": 256, "causal": True}
"""Settings that `mea train` has no option for, as in its default run."""
_ALONE = ("generate", "plot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mea plan [options]"
    model = parser.add_argument_group("model")
    add_options(model, TrainConfig, _MODEL)
    add_options(model, TransformerConfig, _OWN, _OWN)
    model.add_argument(
        "--model",
        metavar="DIRECTORY",
        help="plan a causal language model of transformers instead, by its config.json; --batch-size defaults to 1",
    )
    step = parser.add_argument_group("training step")
    add_options(step, TrainConfig, _STEP)
    step.add_argument("--optimizer", default="adamw", metavar="NAME", help="adamw, adam, sgd, … or none (%(default)s)")
    types = ("fp32", "bf16", "fp16")
    step.add_argument("--dtype", choices=types, help="of the parameters (fp32; with --model: the configuration's)")
    step.add_argument("--precision", default="fp32", choices=types, help="dtype of autocast; fp32: off (%(default)s)")
    step.add_argument("--device", metavar="NAME", help="cpu or cuda, available or not (default: cuda if available)")
    step.add_argument(
        "--keep-gradients",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gradients exist when the step begins, as in accumulation; --no-…: as after zero_grad() (default: on)",
    )
    divided = "processes over which FSDP2 shards parameters, gradients and optimizer state (default: 1)"
    step.add_argument("--shards", type=int, default=1, metavar="PROCESSES", help=divided)
    divided = "processes over which the tokens of each sequence are divided (default: 1); bytes are those of one"
    step.add_argument("--context", type=int, default=1, metavar="PROCESSES", help=divided)
    settings = parser.add_argument_group("settings, chosen for the budget unless given")
    add_options(settings, TransformerConfig, SETTINGS, {"exact": "under mixed precision"})
    asked = parser.add_argument_group("budget and output")
    asked.add_argument("--budget", metavar="SIZE", help="8GiB, 8GB, 8000M, …, or auto: the memory free here")
    asked.add_argument("--generate", action="store_true", help="plan generation instead: a prompt and the next token")
    asked.add_argument("--longest", action="store_true", help="find the longest sequence within the budget")
    asked.add_argument("--plot", metavar="FILE", help="plot the step's memory as PNG")
    asked.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    if args.longest and args.budget is None:
        raise ValueError("--longest needs a --budget, such as 8GiB or auto")
    step: dict[str, Any] = {
        "autocast": None if args.precision == "fp32" else args.precision,
        "device": args.device,
        "optimizer": None if args.optimizer == "none" else args.optimizer,
        "keep_gradients": args.keep_gradients,
        "shards": args.shards,
        "context": args.context,
    }
    return _run(args, step) if args.model is None else _run_model(args, step)


def _run(args: argparse.Namespace, step: dict[str, Any]) -> int:
    from ..planner import max_seq_len, plan

    config, size = _config(args), _given(args, _STEP)
    check_sizes({**config, **size, "shards": args.shards, "context": args.context})
    step |= {"batch_size": size["batch_size"], "dtype": args.dtype or "fp32", "training": not args.generate}
    budget = _budget(args)
    made = plan(config, seq_len=size["seq_len"], budget=budget, **step)
    longest = max_seq_len({**config, **made.settings}, budget=budget, **step) if args.longest else None
    picture = None if args.plot is None else _draw(made, args.plot)
    if args.json:
        print(json.dumps({"config": config, **made.as_dict(), "longest": longest}, indent=2))
    else:
        _print(config, args, made, longest)
        if picture is not None:
            print(f"\npicture: {picture}")
    return 1 if made.budget is not None and not made.fits() else 0


def _run_model(args: argparse.Namespace, step: dict[str, Any]) -> int:
    """Plan a transformers model, before and after make_memory_efficient."""
    given = [
        *given_options(args, (*_MODEL, *_OWN, *SETTINGS)),
        *(name for name in _ALONE if getattr(args, name) not in (None, False)),
    ]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} does not go together with --model: it is for our Transformer")
    size = {"batch_size": 1} | given_options(args, _STEP)
    if "seq_len" not in size:
        raise ValueError("--model needs --seq-len, the tokens of a sequence")
    from ..huggingface import make_memory_efficient
    from ..huggingface.planning import load_on_meta
    from ..torch_internals.fake import log_no_refusals

    if args.from_shell:
        log_no_refusals()
    model = load_on_meta(args.model)
    report = make_memory_efficient(model)
    budget = _budget(args)
    try:
        steps = report.plan(**size, **step, dtype=args.dtype, budget=budget)
    except NotImplementedError as error:
        raise ValueError(f"--model: {error}") from error
    if args.json:
        plans = {state: made.as_dict() for state, made in steps.plans.items()}
        print(json.dumps({"model": type(model).__name__, "plans": plans, "longest": dict(steps.longest)}, indent=2))
    else:
        _print_model(model, args, report, steps)
    return 1 if budget is not None and not steps.after.fits() else 0


def _budget(args: argparse.Namespace) -> Any:
    from ..planner import available_memory
    from ..planner.plan import chosen_device

    if args.budget != "auto":
        return args.budget
    try:
        return available_memory(chosen_device(args.device, {}))
    except NotImplementedError as error:
        raise ValueError(f"--budget: {error}") from error


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the given options, completed by `mea train`'s defaults."""
    return {name: getattr(TrainConfig, name) for name in names} | given_options(args, names)


def _config(args: argparse.Namespace) -> dict[str, Any]:
    config = _given(args, _MODEL) | _OWN | given_options(args, (*_OWN, *SETTINGS))
    if config["window"] is not None and config["causal"]:
        config["window"] = (config["window"], 0)
    if args.budget is None and args.precision != "fp32" and config.get("reversible", True):
        config.setdefault("exact", True)  # as mea train does
    return config


def _draw(made: "Plan", file: str) -> Path:
    from .plan_picture import draw

    if not Path(file).name:
        raise ValueError(f"--plot: expected the name of a file, got {file!r}")
    try:
        with brought_by("train"):
            return draw(made, file)
    except OSError as error:
        raise ValueError(f"--plot: cannot write to {file}: {error.strerror}") from error


def _print(config: dict[str, Any], args: argparse.Namespace, made: "Plan", longest: int | None) -> None:
    from ..planner import format_size

    kind = "causal Transformer" if config["causal"] else "Transformer"
    blocks = f"{config['depth']} block{'' if config['depth'] == 1 else 's'}"
    print(f"{kind} of {blocks}, {config['dim']} wide, {config['heads']} heads of {config['dim_head']},")
    doing = "generating after" if args.generate else f"trained with {args.optimizer} on"
    print(f"{doing} {made.batch_size} × {made.seq_len:,} tokens, device {made.device}")
    shared = [f"{what} over {n}" for what, n in (("parameters", args.shards), ("tokens", args.context)) if n > 1]
    if shared:
        print(f"on each of several processes: {', '.join(shared)}")
    print(f"\n{'needs at its peak':<22}{format_size(made.peak_bytes):>10}")
    for category, nbytes in made.breakdown.items():
        print(f"  {category:<20}{format_size(nbytes):>10}{nbytes / made.peak_bytes:>7.0%}")
    print(f"{'computes':<22}{made.flops / 1e12:>10,.4g}   TFLOP{'' if args.generate else ' a step'}")
    print(fitted(f"\nthe peak is in the {made.peak.describe()}"))
    if len(made.options) > 1:
        _print_options(made)
    used = {**config, **made.settings}
    settings = {name: used[name] for name in SETTINGS if name in used}
    if settings:
        print(fitted("\nsettings: " + ", ".join(f"{name}={value}" for name, value in settings.items())))
    if made.budget is not None:
        room = made.budget - made.peak_bytes
        print(f"\nbudget {format_size(made.budget)}: the step {_verdict(room)}")
        if made.advice:
            print(fitted(made.advice))
            if settings.get("reversible", True) and not settings.get("keep_attention"):
                kept = "these settings keep neither activations nor attention's outputs"
                print(fitted(f"(offloading would save nothing: {kept})"))
    if longest is not None:
        print(f"longest sequence within the budget: {longest:,} tokens")


def _verdict(room: int) -> str:
    from ..planner import format_size

    return f"fits, with {format_size(room)} to spare" if room >= 0 else f"is {format_size(-room)} too large"


def _print_options(made: "Plan") -> None:
    from ..planner import format_size

    print(f"\n{'from the fastest on':<34}{'needs':>10}{'saves':>11}{'computes':>10}")
    before = made.options[0]
    for option in made.options:
        saved = "" if option is before else format_size(before.peak_bytes - option.peak_bytes)
        more = f"{option.flops / made.options[0].flops - 1:+.0%}"
        print(f"  {option.name:<32}{format_size(option.peak_bytes):>10}{saved:>11}{more:>10}")
        before = option


def _print_model(model: Any, args: argparse.Namespace, report: "Report", steps: "StepPlans") -> None:
    from ..planner import format_size

    after, left = steps.after, dict[str, list[str]]()
    for part, why in report.left:
        left.setdefault(why, []).append(part)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__} of {size / 1e6:,.4g} million parameters,")
    print(f"trained with {args.optimizer} on {after.batch_size} × {after.seq_len:,} tokens, device {after.device}")
    width = max(map(len, steps.plans))
    within = f"   longest sequence within {format_size(after.budget)}" if after.budget else ""
    print(f"\n{'needs at its peak':<{width + 10}}{within}".rstrip())
    for state, made in steps.plans.items():
        longest = f"{steps.longest[state]:>16,} tokens" if steps.longest else ""
        print(f"  {state:<{width}}{format_size(made.peak_bytes):>12}{longest}")
    for why, parts in left.items():
        others = f" and {len(parts) - 1} others" if len(parts) > 1 else ""
        print(fitted(f"\nleft as it is: {parts[0]}{others}: {why}"))
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and max([after.seq_len or 0, *steps.longest.values()]) >= most:
        print(f"\nits configuration is for sequences of up to {most:,} tokens")
    if after.budget is not None:
        room = after.budget - after.peak_bytes
        print(f"\nbudget {format_size(after.budget)}: after the call the step {_verdict(room)}")
