"""argparse with errors of one line and the nearest option that exists, and switches that may take a value."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations; a mistake raises ValueError instead of printing the usage and leaving."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hint = nearest(unknown[0].partition("=")[0], known) if unknown[0].startswith("-") else ""
            self.error(f"unknown argument {unknown[0]}{hint}; {self.prog} --help lists them")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


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


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)", or nothing when no known name resembles `name`."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""
