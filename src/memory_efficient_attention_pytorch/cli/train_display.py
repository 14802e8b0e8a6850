"""Display a training run: a live progress bar on a terminal, plain lines elsewhere, little when quiet."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import brought_by
from ..training.files import quoted
from ..training.tracking import Callback, OutputError, Record, Sample, Step, Validation, read_metrics
from .terminal import visible, wrapped

if TYPE_CHECKING:
    from ..training.runs import Outcome

_SECONDS_BETWEEN_LINES = 10.0


def make_display(*, quiet: bool) -> Callable[[bool], Callback]:
    """Return a function that makes each process's display: only the main one shows progress."""

    def display(main: bool) -> Callback:
        if quiet or not main:
            return Quiet()
        return Live() if sys.stdout.isatty() else Lines()

    return display


class Quiet(Callback):
    """Prints only what the user must know."""

    def notice(self, text: str) -> None:
        print(f"mea train: {text}", file=sys.stderr, flush=True)


class Lines(Quiet):
    """Prints a line at intervals, for a file or another program."""

    def __init__(self) -> None:
        self.next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self.run: Path | None = None

    def reading(self, done: int, total: int) -> None:
        self._now_and_then(f"reading: {done / 1e6:.1f} MB of text")

    def started(self, plan: str, run: Path, first_step: int, steps: int) -> None:
        self.next_line, self.run = 0.0, run
        self._print(f"{run}: {plan}")
        if first_step:
            self._print(f"going on after step {first_step}")
        self.steps = steps

    def log(self, record: Record) -> None:
        match record:
            case Step():
                self._now_and_then(f"step {record.step}/{self.steps}  {numbers(record)}")
            case Validation():
                self._print(validation_line(record))
            case Sample():
                continued = f"{indented(record.prompt)}|{indented(record.sample, first='')}"
                self._print(f"sample at step {record.step}, after the |:\n{continued}")

    def _now_and_then(self, line: str) -> None:
        if time.monotonic() >= self.next_line:
            self._print(line)
            self.next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            go_on = f"; go on with: mea train --resume {quoted(self.run)}" if self.run else ""
            raise OutputError(f"cannot write to standard output ({error.strerror}){go_on}") from error


class Live(Lines):
    """Shows a progress bar with the current numbers at the foot of the terminal; the rest scrolls above it."""

    def __init__(self) -> None:
        super().__init__()
        with brought_by("train"):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
        console = Console(highlight=False)
        self.bar_width = max(6, min(30, console.width - 76))
        self.progress = Progress(
            TextColumn("{task.fields[name]}"),
            BarColumn(bar_width=self.bar_width),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task("", name="reading", numbers="", total=None)
        self.progress.start()

    def reading(self, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=max(done, total), numbers=f"{done / 1e6:.1f} MB")

    def started(self, plan: str, run: Path, first_step: int, steps: int) -> None:
        super().started(plan, run, first_step, steps)
        self.progress.update(self.task, completed=first_step, total=steps, name=f"{first_step}/{steps}", numbers="")

    def log(self, record: Record) -> None:
        from rich.padding import Padding
        from rich.text import Text

        if isinstance(record, Step):
            name = f"{record.step}/{self.steps}"
            room = self.progress.console.width - len(name) - self.bar_width - 2  # a column between each two
            self.progress.update(self.task, completed=record.step, name=name, numbers=numbers(record, room))
        elif isinstance(record, Sample):
            continued = Text.assemble((f"{visible(record.prompt)}|", "dim"), visible(record.sample))
            self.progress.console.print(Text(f"sample at step {record.step}, after the |:", "bold"))
            self.progress.console.print(Padding(continued, (0, 0, 0, 4), expand=False))
        else:
            super().log(record)

    def notice(self, text: str) -> None:
        from rich.text import Text

        self.progress.console.print(Text.assemble(("note:", "yellow"), f" {text}"))  # not markup: it may name paths

    def close(self) -> None:
        self.progress.stop()

    def _print(self, text: str) -> None:
        self.progress.console.print(wrapped(text, self.progress.console.width), markup=False)


def numbers(step: Step, room: int | None = None) -> str:
    """The numbers of a step, in about sixty columns; where there is no room for all, the first ones."""
    parts = [
        f"loss {step.loss:.3f}",
        f"{step.bits_per_byte:.2f} bits/byte",
        f"{duration(step.seconds_left)} left",
        f"{_short(step.tokens_per_second)} tok/s",
        f"{step.memory_now >> 20}/{step.memory_peak >> 20} MiB",
    ]
    while room is not None and len("  ".join(parts)) > room and len(parts) > 1:
        parts.pop()
    return "  ".join(parts)


def validation_line(validation: Validation) -> str:
    return (
        f"validation at step {validation.step}: loss {validation.validation_loss:.3f}, "
        f"{validation.validation_bits_per_byte:.2f} bits per byte{' (best)' if validation.best else ''}"
    )


def indented(text: str, first: str = "    ") -> str:
    """Make text safe for a terminal, with its lines indented."""
    return first + visible(text).replace("\n", "\n    ")


def summary(outcome: "Outcome") -> str:
    """Summarise a finished run, and say what to do next."""
    run, state = outcome.run, outcome.state
    records = read_metrics(run.metrics)
    bits = [
        (record["validation_bits_per_byte"], record["step"])
        for record in records
        if "validation_bits_per_byte" in record
    ]
    peaks = [record["memory_peak"] for record in records if "memory_peak" in record]
    lines = [
        f"done: {state.step} steps, {state.tokens:,} tokens in {duration(state.seconds)} "
        f"({_short(state.tokens / max(state.seconds, 1e-9))} tok/s), {outcome.parameters:,} parameters"
    ]
    if bits:  # the file may have been removed
        best, step = min(bits)
        lines.append(f"validation: {bits[0][0]:.2f} -> {bits[-1][0]:.2f} bits per byte, best {best:.2f} at step {step}")
    if outcome.memory or peaks:
        lines.append(f"memory: {outcome.memory.result() if outcome.memory else f'{max(peaks) >> 20} MiB at the peak'}")
    lines += [
        f"curve: {run.plot}",
        f"numbers: {run.metrics}",
        f"weights: {run.checkpoints.root}",
        f"next: mea generate {run.quoted} --prompt '{'...' if outcome.config.data else 'import '}'",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
