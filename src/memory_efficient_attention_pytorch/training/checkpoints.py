"""Checkpoints: a directory each, written whole or not at all, verified before use.

A checkpoint holds `model.safetensors`, `optimizer.safetensors`, `state.json` and `SHA256SUMS` of the three (which
`sha256sum --check` reads). The random generators need no entry: step s is seeded by (seed, s, process), so the step's
number is their state, and the position in the data too.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from .files import directory_written_atomically, discard
from .sharding import gathered, is_sharded, parted

_PREFIX = "step-"
_NAME = re.compile(r"step-\d{8,}")
_UNFINISHED = re.compile(r"\.step-\d{8,}\.(partial|discarded)")
_SUMS = "SHA256SUMS"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Where a run stands, besides its weights and the optimizer's averages.

    step: optimizer steps done. tokens: trained on so far, by all processes. seconds: spent training.
    validation_loss: nats per token measured after this very step, None if it was not measured then.
    best_loss: the lowest validation loss so far. windows_per_step: of all processes, which the data position counts in.
    scaler: the fp16 gradient scaler's numbers, None in other precisions.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validation_loss: float | None = None
    best_loss: float | None = None
    windows_per_step: int = 0
    scaler: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: TrainState

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def optimizer(self) -> Path:
        return self.path / "optimizer.safetensors"


class Checkpoints:
    """The checkpoints of a run, in a directory of their own."""

    def __init__(self, root: Path):
        self.root = root

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, *, main: bool = True
    ) -> Checkpoint:
        """Write a checkpoint. Whatever stops it, the ones before are untouched and no half of this one is seen.

        Of a model that is sharded every process has to save, and the main one alone writes.
        """
        path = self.root / f"{_PREFIX}{state.step:08d}"
        averages, sharded = _optimizer_tensors(model, optimizer), is_sharded(model)
        if sharded:
            weights, averages = (gathered(each, keep=main) for each in (model.state_dict(), averages))
        if not main:
            return Checkpoint(path, state)
        with directory_written_atomically(path) as directory:
            if sharded:
                save_file(weights, directory / "model.safetensors")
            else:
                save_model(model, str(directory / "model.safetensors"))
            save_file(averages, directory / "optimizer.safetensors")
            (directory / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")
            sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(directory.iterdir())]
            (directory / _SUMS).write_text("".join(sums))
        return Checkpoint(path, state)

    def find(self, which: str = "last", report: Callable[[str], None] = warnings.warn) -> Checkpoint | None:
        """The "last" checkpoint or the "best" (lowest validation loss); with none measured, best means last.

        A checkpoint that is truncated, altered or without sums is named to `report` and the next in order is tried.
        """
        if which not in ("last", "best"):
            raise ValueError(f"checkpoint must be 'last' or 'best', got {which!r}")
        found = self._readable(report)
        found.sort(key=lambda checkpoint: checkpoint.state.step, reverse=True)
        if which == "best":
            found.sort(key=_loss_or_infinity)
        for checkpoint in found:
            if (flaw := find_flaw(checkpoint.path)) is None:
                return checkpoint
            report(f"checkpoint {checkpoint.path} is damaged ({flaw})")
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` and the best."""
        found = sorted(self._readable(), key=lambda checkpoint: checkpoint.state.step)
        best = min(found, key=_loss_or_infinity, default=None)
        for checkpoint in found[:-keep]:
            if checkpoint is not best:
                discard(checkpoint.path)

    def set_aside_after(self, step: int) -> None:
        """Give the checkpoints beyond `step`, damaged since a run goes on from the last sound one, other names."""
        for path in self._paths():
            if int(path.name.removeprefix(_PREFIX)) > step:
                names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
                path.rename(next(name for name in names if not os.path.lexists(name)))

    def remove_unfinished(self) -> None:
        """Remove what writes and removals that were cut short left behind."""
        for path in self.root.glob(f".{_PREFIX}*"):
            if _UNFINISHED.fullmatch(path.name):
                discard(path)

    def _readable(self, report: Callable[[str], None] = lambda text: None) -> list[Checkpoint]:
        found = []
        for path in self._paths():
            try:
                state = TrainState(**json.loads((path / "state.json").read_text()))
                found.append(Checkpoint(path, state))
            except (OSError, ValueError, TypeError) as error:
                report(f"checkpoint {path} is damaged ({error})")
        return found

    def _paths(self) -> list[Path]:
        """The directories with names as `save` gives; all else there belongs to someone else and is left alone."""
        found = self.root.glob(f"{_PREFIX}*")
        return [path for path in found if _NAME.fullmatch(path.name) and path.is_dir()]


def _loss_or_infinity(checkpoint: Checkpoint) -> float:
    loss = checkpoint.state.validation_loss
    return math.inf if loss is None else loss


def find_flaw(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if every one has the sum it was written with."""
    try:
        lines = (path / _SUMS).read_text().splitlines()
        expected = {name: checksum for checksum, name in (line.split("  ") for line in lines)}
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            if expected.get(name) != _sha256(path / name):
                return f"{name} is truncated or altered"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except ValueError:
        return f"{_SUMS} is altered"
    return None


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shape. Raises ValueError for one of another shape."""
    try:
        with _utf8_name(checkpoint.model) as file:
            load_model(model, file)
    except RuntimeError as error:  # what load_state_dict raises, a line for each weight
        raise ValueError(
            f"the weights in {checkpoint.path} are not those of the model in the run's config.toml: was that changed "
            "later?"
        ) from error


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Give `optimizer`, which holds `model`'s parameters, the averages it had at the checkpoint."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    with _utf8_name(checkpoint.optimizer) as file:
        tensors = load_file(file)
    parameters = dict(model.named_parameters())
    for index, name in enumerate(_names_in_order(model, optimizer)):
        prefix, like = f"{name}:", parameters[name]
        of_it = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        state[index] = {key: parted(tensor, like) for key, tensor in of_it.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    names = list(_names_in_order(model, optimizer))
    return {f"{names[i]}:{key}": value.contiguous() for i, entry in state.items() for key, value in entry.items()}


def _names_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Parameter names in the order in which an optimizer's state_dict numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)]


@contextlib.contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """The path, or where safetensors, which reads UTF-8 names only, cannot take it, that of a link to it for now."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / path.name
            link.symlink_to(path.absolute())
            yield str(link)
    else:
        yield str(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
