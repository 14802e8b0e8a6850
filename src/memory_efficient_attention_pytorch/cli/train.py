"""Train a Transformer on text: files, directories, .gz files, standard input, or, by default, the sources of the
Python standard library. Weights and measurements go to a run directory, runs/1, runs/2 and so on.

  mea train                                   try it out
  mea train --data book.txt notes/            your own text, as bytes
  mea train --data corpus/ --vocab-size 8000  with a tokenizer trained on it
  mea train --resume                          go on with the latest run
"""

import argparse
import dataclasses
import itertools
import os
import sys
from typing import NoReturn

from ..training.config import TrainConfig, known_keys, read_values
from .parser import add_options, given_options
from .terminal import fitted
from .train_display import make_display, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of TrainConfig, and those that say where a run is."""
    parser.usage = "mea train [options]"
    run = parser.add_argument_group("run")
    run.add_argument("--config", metavar="FILE", help="a TOML file with options as below, which override it")
    run.add_argument("--out", metavar="DIR", help="the run's directory, new or empty (default: the next under runs/)")
    run.add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        const=True,
        help="resume a run from its last checkpoint (default RUN: --out, or else the latest under runs/)",
    )
    run.add_argument("--quiet", action="store_true", help="print only errors and warnings")
    for name, fields in itertools.groupby(dataclasses.fields(TrainConfig), lambda field: field.metadata["group"]):
        add_options(parser.add_argument_group(name), TrainConfig, [field.name for field in fields])


def run(args: argparse.Namespace) -> int:
    for option in ("out", "resume"):
        if getattr(args, option) == "":
            raise ValueError(f"--{option}: expected the name of a directory, got an empty one")
    named = args.resume if isinstance(args.resume, str) else None
    options = (read_values(args.config) if args.config else {}) | given_options(args, known_keys())
    if args.resume is None:
        config = TrainConfig(**options)
    elif named and args.out and os.path.realpath(named) != os.path.realpath(args.out):
        raise ValueError(f"--resume and --out contradict each other: {named} and {args.out} are different places")

    # These imports take seconds, so they come after the options were checked.
    from ..training.interruption import Interrupted
    from ..training.runs import latest_run, resume_run, start_run

    display = make_display(quiet=args.quiet)
    try:
        if args.resume is not None:
            outcome = resume_run(named or args.out or latest_run(), options, display)
        else:
            outcome = start_run(config, args.out, display)
    except Interrupted as interrupted:
        if interrupted.main:
            print(fitted(f"mea train: {interrupted}", sys.stderr), file=sys.stderr)
        return 128 + interrupted.signal
    if outcome.main and not args.quiet:
        print(fitted(summary(outcome)))
    if args.from_shell and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _end_at_once()
    return 0


def _end_at_once() -> NoReturn:
    """End this process with success, all being written.

    Threads of the processes' group may outlive the interpreter's objects. C++ then ends the process with SIGABRT, now
    and then, which a launcher takes for a failure of the run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
