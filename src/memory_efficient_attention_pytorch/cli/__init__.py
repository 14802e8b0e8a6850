"""The command line: `mea COMMAND`, also `python -m memory_efficient_attention_pytorch COMMAND`."""

import importlib
import io
import os
import sys
import time
from collections.abc import Sequence

from ..common.errors import nearest
from ..common.version import __version__
from .parser import Parser

# One row per command: its name, its module and its line in `mea --help`. The module has
#
#   add_arguments(parser)   declares the command's options (the module's docstring is the description in --help);
#   run(args) -> int        does the work, prints, and returns the exit status. args.from_shell: whether this process
#                           was started for the command, not by a program that calls main().
#
# A user's mistake is a ValueError with a one-line message that says what to do: status 2. A failure during the work for
# a reason outside the options is a training.files.RunError, an OSError, or a lack of memory: status 1. Of several
# processes started by torchrun or the like, the first on each machine prints the message for all. None shows a
# traceback without --debug, which every command has. A module is imported only when its command is called, so that
# `mea --help` is fast and optional dependencies load on use.
COMMANDS = {
    "train": ("train", "train a Transformer on text, your own or Python's standard library's"),
    "generate": ("generate", "write text with a model that `mea train` made"),
    "export": ("export", "write a trained model as one of Hugging Face transformers"),
    "plan": ("plan", "say before a run what memory it needs, or what fits"),
    "bench": ("bench", "measure memory and speed on this machine"),
    "env": ("env", "say what a report of a fault needs: versions and the machine"),
}

_USAGE_ERROR, _RUN_ERROR, _INTERRUPTED = 2, 1, 130
_SECONDS_TO_SPEAK = 5.0
"""How long other processes wait, so that the first can report the error before a launcher stops it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 a mistake in the arguments."""
    _accept_any_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    command = f"mea {name}" if name in COMMANDS else "mea"
    debug = "--debug" in arguments
    try:
        if name is None or arguments[0] != name:
            status = _general(arguments)
        elif name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}{nearest(name, COMMANDS)}; mea --help lists them")
        else:
            status = _run(name, arguments[1:], from_shell=argv is None)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _let_go_of_output()
        return _RUN_ERROR
    except (ValueError, KeyboardInterrupt) as error:
        if debug:
            raise
        wrong = isinstance(error, ValueError)
        status = _USAGE_ERROR if wrong else _INTERRUPTED
        if not _is_first_process():
            # The first process has the same options and files, so it reports the same mistake.
            return _wait(status)
        return _fail(command, error if wrong else "interrupted", status)
    except (RuntimeError, OSError, MemoryError) as error:
        from ..training.files import ElsewhereError

        message = _outside_reason(error)
        if debug or message is None:
            raise
        if isinstance(error, ElsewhereError):
            return _wait(_USAGE_ERROR if error.mistake else _RUN_ERROR)
        _let_go_of_output()
        if not _is_first_process():
            _wait(_RUN_ERROR)  # if nothing ended this process meanwhile, it alone has failed
        return _fail(command, message, _RUN_ERROR)


def _general(arguments: list[str]) -> int:
    """Run `mea`, `mea --help` or `mea --version`."""
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog="mea",
        usage="mea COMMAND [options]",
        description="Transformers on sequences far longer than memory should allow.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
        + "\n\nmea COMMAND --help explains a command. To begin, run: mea train",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    if parser.parse_args(arguments).version:
        print("mea", __version__)
    else:
        parser.print_help()
    return 0


def _run(name: str, arguments: list[str], *, from_shell: bool) -> int:
    module = importlib.import_module(f".{COMMANDS[name][0]}", __name__)
    parser = Parser(prog=f"mea {name}", description=module.__doc__)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    args.from_shell = from_shell
    return int(module.run(args))


def _outside_reason(error: Exception) -> object:
    """Return the message for an error with a cause outside this program; None for any other."""
    from ..training.files import RunError

    # PyTorch's own class is for accelerators' memory only; NumPy's is a subclass of Python's.
    lacking = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if lacking or "can't allocate memory" in str(error):
        return "not enough memory for these sizes: choose smaller ones; mea plan predicts what they need"
    return error if isinstance(error, RunError | OSError) else None


def _is_first_process() -> bool:
    """Return whether this is the only process, or the first of those that a launcher started on this machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _wait(status: int) -> int:
    time.sleep(_SECONDS_TO_SPEAK)
    return status


def _accept_any_output() -> None:
    """Discard output to a closed stdout; replace characters that its encoding lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _let_go_of_output() -> None:
    """Keep the interpreter from writing to an unusable stdout, and from complaining, at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(command: str, message: object, status: int) -> int:
    try:
        print(f"{command}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    except OSError:
        _let_go_of_output()
    return status
