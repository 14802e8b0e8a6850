"""What a run tells about itself while it goes, and who listens: whoever is shown it, and the files that keep it."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import write_atomically


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


class Watcher:
    """Is told what happens. Does nothing by itself; override what is of interest."""

    def reading(self, done: int, total: int) -> None:
        """Text is being tokenised: bytes so far and on the disk (0 if not known)."""

    def started(self, plan: str, run: Path, first_step: int, steps: int) -> None:
        """Training begins. `plan`: what it uses and why, in one line."""

    def budgeted(self, text: str) -> None:
        """What the memory budget made of the run, in one line."""

    def step(self, step: Step) -> None: ...

    def validation(self, validation: Validation) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def saved(self, step: int, path: Path) -> None: ...

    def notice(self, text: str) -> None:
        """Something the user should know, such as a damaged checkpoint that was passed over."""

    def close(self) -> None: ...


class Watchers(Watcher):
    """Tells several watchers, but does not close them: each is closed by who made it."""

    def __init__(self, watchers: Iterable[Watcher]):
        self.watchers = list(watchers)

    def reading(self, done: int, total: int) -> None:
        self._tell("reading", done, total)

    def started(self, plan: str, run: Path, first_step: int, steps: int) -> None:
        self._tell("started", plan, run, first_step, steps)

    def budgeted(self, text: str) -> None:
        self._tell("budgeted", text)

    def step(self, step: Step) -> None:
        self._tell("step", step)

    def validation(self, validation: Validation) -> None:
        self._tell("validation", validation)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._tell("sample", step, prompt, text)

    def saved(self, step: int, path: Path) -> None:
        self._tell("saved", step, path)

    def notice(self, text: str) -> None:
        self._tell("notice", text)

    def _tell(self, what: str, *news: Any) -> None:
        for watcher in self.watchers:
            getattr(watcher, what)(*news)


class MetricsFile(Watcher):
    """Appends a JSON object per event to `metrics.jsonl`. A run that goes on drops what lies beyond its first step."""

    def __init__(self, path: Path, first_step: int):
        if path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= first_step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def step(self, step: Step) -> None:
        self._write(dataclasses.asdict(step))

    def validation(self, validation: Validation) -> None:
        self._write(dataclasses.asdict(validation))

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._write({"step": step, "prompt": prompt, "sample": text})

    def close(self) -> None:
        # Each line was flushed when it was written: what a full disk refused then has been told.
        with contextlib.suppress(OSError):
            self.file.close()

    def _write(self, record: dict[str, Any]) -> None:
        # JSON has no infinity, which a gradient's norm is when the fp16 scaler is too bold.
        sound = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(sound) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class TensorBoardFile(Watcher):
    """The same numbers for TensorBoard. Raises ValueError if the package is missing."""

    def __init__(self, path: Path, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tensorboard is not installed: pip install 'memory-efficient-attention-pytorch[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(path), purge_step=first_step + 1)

    def step(self, step: Step) -> None:
        for name in ("loss", "bits_per_byte", "learning_rate", "gradient_norm", "tokens_per_second", "memory_now"):
            self.writer.add_scalar(f"train/{name}", getattr(step, name), step.step)

    def validation(self, validation: Validation) -> None:
        self.writer.add_scalar("validation/loss", validation.validation_loss, validation.step)
        self.writer.add_scalar("validation/bits_per_byte", validation.validation_bits_per_byte, validation.step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.writer.add_text("sample", prompt + text, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.writer.close()
