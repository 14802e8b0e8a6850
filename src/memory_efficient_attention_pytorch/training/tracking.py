"""The measurements of a run, the callbacks that receive them, and the files that keep them."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..common.errors import brought_by
from .files import RunError, write_atomically


class OutputError(RunError):
    """Raised when a callback cannot write to its output."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step. loss in nats per token; memory in bytes, see `resources`; tokens of all processes so far."""

    step: int
    tokens: int
    loss: float
    bits_per_byte: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds_left: float
    memory_now: int
    memory_peak: int


@dataclasses.dataclass(frozen=True)
class Validation:
    """A measurement over the fixed validation set, in nats per token and bits per byte."""

    step: int
    tokens: int
    validation_loss: float
    validation_bits_per_byte: float
    best: bool


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text that the model generated after a prompt from the validation text."""

    step: int
    prompt: str
    sample: str


Record = Step | Validation | Sample


class Callback:
    """Receives the events of a run. The methods do nothing; override those of interest."""

    def reading(self, done: int, total: int) -> None:
        """Report progress of tokenising: bytes read so far, and bytes on disk (0 if not known)."""

    def started(self, plan: str, run: Path, first_step: int, steps: int) -> None:
        """Report that training begins. `plan`: what it uses and why, a line each for the run and its memory budget."""

    def log(self, record: Record) -> None:
        """Report a measurement."""

    def notice(self, text: str) -> None:
        """Report something the user should know, such as a damaged checkpoint that was skipped."""

    def close(self) -> None:
        """Release resources; no more events follow."""


class MetricsFile(Callback):
    """Appends a JSON object per record to `metrics.jsonl`. A resumed run drops records after its first step.

    The file is opened for every record, so that one that was removed meanwhile is made anew.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= first_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))

    def log(self, record: Record) -> None:
        # JSON has no infinity, which a gradient's norm becomes when the fp16 scale is too large.
        values = dataclasses.asdict(record).items()
        sound = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sound) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of `metrics.jsonl`, none if the file is missing.

    Lines that are no record, such as one cut short by a kill, are left out.
    """
    records = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class TensorBoardFile(Callback):
    """Writes the same numbers for TensorBoard. Raises ValueError if the package is missing or the path not UTF-8."""

    def __init__(self, path: Path, first_step: int):
        with brought_by("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        try:
            self.writer: Any = SummaryWriter(str(path), purge_step=first_step + 1)
        except UnicodeEncodeError as error:
            raise ValueError("tensorboard writes only to paths that are UTF-8: choose another --out") from error

    def log(self, record: Record) -> None:
        if isinstance(record, Sample):
            self.writer.add_text("sample", record.prompt + record.sample, record.step)
            return
        shown = _TRAIN if isinstance(record, Step) else _VALIDATION
        for tag, name in shown.items():
            self.writer.add_scalar(tag, getattr(record, name), record.step)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.writer.close()


_TRAIN = {
    f"train/{name}": name
    for name in ("loss", "bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second", "memory_now")
}
_VALIDATION = {f"validation/{name}": f"validation_{name}" for name in ("loss", "bits_per_byte")}
