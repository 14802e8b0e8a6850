"""Text in the width of a terminal."""

import shutil
import sys
import textwrap
from typing import TextIO


def wrapped(text: str, columns: int) -> str:
    """Break lines between words; what goes on stands two columns further in than its line."""

    def broken(line: str) -> str:
        margin = line[: len(line) - len(line.lstrip())]
        return textwrap.fill(
            line.lstrip(),
            columns,
            initial_indent=margin,
            subsequent_indent=margin + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )

    return "\n".join(line if len(line) <= columns else broken(line) for line in text.split("\n"))


def fitted(text: str, stream: TextIO | None = None) -> str:
    """The text for a stream (standard output): in the width of a terminal, as it is for a file or another program."""
    stream = sys.stdout if stream is None else stream
    return wrapped(text, shutil.get_terminal_size().columns) if stream.isatty() else text


def note(command: str, text: str) -> None:
    """Print what the user of a command should know to standard error."""
    print(fitted(f"{command}: note: {text}", sys.stderr), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Make text safe for a terminal: control characters become dots."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
