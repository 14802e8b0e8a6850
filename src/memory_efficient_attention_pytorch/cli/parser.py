"""argparse for dataclasses: one-line errors that name the nearest option, and switches with optional values."""

import argparse
import dataclasses
import itertools
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ..common.errors import nearest
from ..models.config import value_type


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations; a mistake raises ValueError instead of printing the usage and exiting."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hint = nearest(unknown[0].partition("=")[0], known) if unknown[0].startswith("-") else ""
            self.error(f"unknown argument {unknown[0]}{hint}; {self.prog} --help lists them")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # so that a failure to write the help is reported like any other error
        super().exit(status, message)


class _HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs; indented lines, which are examples and lists, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = itertools.groupby(text.splitlines(), lambda line: bool(line.strip()) and not line.startswith(" "))
        return "\n".join(
            textwrap.fill(" ".join(lines), width) if prose else "\n".join(lines) for prose, lines in blocks
        )


class Switch(argparse.BooleanOptionalAction):
    """``--name`` and ``--no-name``; ``--name CHOICE`` where there are choices."""

    def __init__(self, choices: tuple[str, ...] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.choices, self.nargs = choices, "?" if choices else 0

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        off = option is not None and option.startswith("--no-")
        if values and off:
            raise argparse.ArgumentError(self, f"{option} takes no value, got {values!r}")
        setattr(namespace, self.dest, values or not off)


def add_options(
    parser: argparse._ActionsContainer, config: type, names: Iterable[str], defaults: Mapping[str, Any] | None = None
) -> None:
    """Add an option for each of these fields of a dataclass; options not given are absent from the arguments.

    defaults: defaults to show in --help instead of the fields' own.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in names:
        field, kind = fields[name], value_type(config, name)
        about, default = field.metadata, {name: field.default, **(defaults or {})}[name]
        # Several values have the type of the default's; without one, where there is a default, there are none.
        each = kind if kind is not tuple else type(default[0]) if default else str
        shown = about["unset"] if default is None else default
        if isinstance(default, bool):
            shown = "on" if default else "off"
        elif isinstance(default, tuple):
            shown = " ".join(map(str, default))
        help = about["help"] + (f" (default: {shown})" if shown != "" else "")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
        metavar = about.get("metavar") or {int: "N", float: "X"}.get(each)
        if kind is bool:
            options |= {"action": Switch, "choices": about["choices"] or None}
        elif about["choices"]:
            options |= {"choices": about["choices"]}
        elif kind is tuple:
            nargs = "*" if default else "+"
            options |= {"type": each, "nargs": nargs, "action": "extend", "metavar": metavar}
        else:
            options |= {"type": kind, "metavar": metavar}
        parser.add_argument("--" + name.replace("_", "-"), **options)


def given_options(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options added by `add_options` that were given; of several values a tuple."""
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
