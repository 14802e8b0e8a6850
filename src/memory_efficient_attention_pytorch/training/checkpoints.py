"""Checkpoints: a directory each, written whole or not at all, verified before use.

A checkpoint holds `model.safetensors`, `optimizer.safetensors`, `state.json` and `SHA256SUMS` of the three (which
`sha256sum --check` reads). If the model is sharded, each process writes its part, `model-00001-of-00004.safetensors`
and `optimizer-00001-of-00004.safetensors`. Either kind is read by any number of processes, sharded or not. Random
generators are not saved: step s is seeded by (seed, s, process), so the step's number is their state and the position
in the data.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from .files import directory_written_atomically, discard, sha256
from .sharding import is_sharded

_PREFIX = "step-"
_NAME = re.compile(r"step-\d{8,}")
_UNFINISHED = re.compile(r"\.step-\d{8,}\.(partial|discarded)")
_FILE = re.compile(r"(model|optimizer)(?:-(\d{5,})-of-(\d{5,}))?\.safetensors")
_SUMS = "SHA256SUMS"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run besides its weights and the optimizer's averages.

    step: optimizer steps done. tokens: trained on so far, by all processes. seconds: spent training.
    validation_loss: nats per token measured after this step, None if it was not measured then.
    best_loss: the lowest validation loss so far. windows_per_step: of all processes; the position in the data is the
    step times this. scaler: state of the fp16 gradient scaler, None in other precisions.
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

    def files(self, kind: str) -> list[Path]:
        """Return the files listed in SHA256SUMS for "model" or "optimizer": one, or a part from each process."""
        return [self.path / name for name in _read_sums(self.path) if (of := _FILE.fullmatch(name)) and of[1] == kind]


class Checkpoints:
    """The checkpoints of a run, in a directory of their own."""

    def __init__(self, root: Path):
        self.root = root

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write a checkpoint. If that is cut short, earlier ones are untouched and none looks half written.

        If the model is sharded, this is a collective and each process writes its part; else it is for the main one.
        """
        path = self._path(state.step)
        averages = _optimizer_tensors(model, optimizer)

        def finish(directory: Path, sums: dict[str, str]) -> None:
            (directory / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")
            sums["state.json"] = sha256(directory / "state.json")
            (directory / _SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))

        if is_sharded(model):
            from .parts import save_parts

            save_parts(path, {"model": model.state_dict(), "optimizer": averages}, finish)
        else:
            with directory_written_atomically(path) as directory:
                save_model(model, str(directory / "model.safetensors"))
                save_file(averages, directory / "optimizer.safetensors")
                finish(directory, {file.name: sha256(file) for file in sorted(directory.iterdir())})

    def find(self, which: str = "last", report: Callable[[str], None] = warnings.warn) -> Checkpoint | None:
        """Return the "last" checkpoint or the "best" (lowest validation loss); with none measured, best means last.

        A checkpoint that is truncated, altered or without sums is passed to `report` and the next in order is tried.
        None if no checkpoint is intact. Raises ValueError for another `which`.
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
        """Remove all but the newest `keep` and the best, and those in which the user put something."""
        found = sorted(self._readable(), key=lambda checkpoint: checkpoint.state.step)
        best = min(reversed(found), key=_loss_or_infinity, default=None)
        for checkpoint in found[:-keep]:
            if checkpoint is not best and _holds_nothing_else(checkpoint.path):
                discard(checkpoint.path)

    def renamed(self) -> list[str]:
        """Return in words which checkpoints are of another step than their name says: copies, links or renamed."""
        others = (found for found in self._readable() if found.path != self._path(found.state.step))
        return [f"{found.path.name} is of step {found.state.step}" for found in others]

    def set_aside_after(self, step: int) -> None:
        """Rename the damaged checkpoints after `step`: a run resumes from the last intact one."""
        readable = {found.path for found in self._readable()}
        for path in self._paths():
            after = int(path.name.removeprefix(_PREFIX)) > step
            if after and (path not in readable or find_flaw(path) is not None):
                names = (path.with_name(f"{path.name}.damaged{n or ''}") for n in itertools.count())
                path.rename(next(name for name in names if not os.path.lexists(name)))

    def remove_unfinished(self) -> None:
        """Remove what interrupted writes and removals left behind."""
        for path in self.root.glob(f".{_PREFIX}*"):
            if _UNFINISHED.fullmatch(path.name):
                discard(path)

    def _readable(self, report: Callable[[str], None] = lambda text: None) -> list[Checkpoint]:
        found = []
        for path in self._paths():
            try:
                state = TrainState(**json.loads((path / "state.json").read_text()))
                _check(state)
                found.append(Checkpoint(path, state))
            except (OSError, ValueError, TypeError) as error:
                report(f"checkpoint {path} is damaged ({error})")
        return found

    def _path(self, step: int) -> Path:
        return self.root / f"{_PREFIX}{step:08d}"

    def _paths(self) -> list[Path]:
        """Return the directories named as `save` names them; anything else is the user's and left alone.

        Raises OSError if the checkpoints cannot be reached: there may be some.
        """
        if not os.path.lexists(self.root):
            return []
        found = [self.root / name for name in os.listdir(self.root) if _NAME.fullmatch(name)]
        return [path for path in found if path.is_dir() and path == self._path(int(path.name.removeprefix(_PREFIX)))]


def _check(state: TrainState) -> None:
    counts = (state.step, state.tokens, state.windows_per_step)
    losses = (state.seconds, state.validation_loss or 0.0, state.best_loss or 0.0)
    right = all(type(x) is int and x >= 0 for x in counts) and all(isinstance(x, int | float) for x in losses)
    if not right:
        raise ValueError("state.json holds values of other kinds than were written")


def _holds_nothing_else(path: Path) -> bool:
    """Return whether a checkpoint has only files that `save` writes, hidden ones of the system aside."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    return all(name in ("state.json", _SUMS) or _FILE.fullmatch(name) for name in names)


def _loss_or_infinity(checkpoint: Checkpoint) -> float:
    loss = checkpoint.state.validation_loss
    return math.inf if loss is None else loss


def find_flaw(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, None if every checksum is right."""
    try:
        expected = _read_sums(path)
        for name in _names(expected):
            if expected.get(name) != sha256(path / name):
                return f"{name} is truncated or altered"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except ValueError:
        return f"{_SUMS} is altered"
    return None


def _read_sums(path: Path) -> dict[str, str]:
    lines = (path / _SUMS).read_text().splitlines()
    return {name: checksum for checksum, name in (line.split("  ") for line in lines)}


def _names(sums: Iterable[str]) -> list[str]:
    """Return the files that a checkpoint with these must have. Raises ValueError for parts of different numbers."""
    names = []
    for kind in ("model", "optimizer"):
        counts = {of[3] for name in sums if (of := _FILE.fullmatch(name)) and of[1] == kind} or {None}
        if len(counts) > 1:
            raise ValueError(f"{kind}: expected parts of one number of processes, got {counts}")
        [count] = counts
        numbers = [""] if count is None else [f"-{i:05d}-of-{count}" for i in range(1, int(count) + 1)]
        names += [f"{kind}{number}.safetensors" for number in numbers]
    return [*names, "state.json"]


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model of the same shape; a collective if the model is sharded.

    Raises ValueError for a model of another shape.
    """
    files = checkpoint.files("model")
    try:
        if len(files) > 1 or is_sharded(model):
            from .parts import load_parts

            return load_parts(files, {name: tensor.detach() for name, tensor in model.state_dict().items()})
        with _utf8_name(files[0]) as file:
            load_model(model, file)
    except (RuntimeError, ValueError) as error:  # what load_state_dict raises, a line for each weight
        raise ValueError(
            f"the weights in {checkpoint.path} are not those of the model in the run's config.toml: was it changed "
            "later?"
        ) from error


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Load the checkpoint's averages into `optimizer`, which holds `model`'s parameters."""
    files = checkpoint.files("optimizer")
    if len(files) > 1 or is_sharded(model):
        tensors = _averages_by_parts(dict(model.named_parameters()), files)
    else:
        with _utf8_name(files[0]) as file:
            tensors = load_file(file)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for index, name in enumerate(_names_in_order(model, optimizer)):
        prefix = f"{name}:"
        state[index] = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _averages_by_parts(parameters: Mapping[str, torch.Tensor], files: list[Path]) -> dict[str, torch.Tensor]:
    """Load the averages in the files, sharded as their parameters are."""
    from .parts import load_parts, shapes_in

    tensors = {}
    for name, (shape, dtype) in shapes_in(files).items():
        like = parameters[name.rpartition(":")[0]].detach()
        # An entry that is not an average, such as the number of steps, has a shape of its own.
        tensors[name] = torch.empty_like(like, dtype=dtype) if like.shape == shape else torch.empty(shape, dtype=dtype)
    load_parts(files, tensors)
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = ((name, optimizer.state.get(parameter, {})) for name, parameter in model.named_parameters())
    return {f"{name}:{key}": value.contiguous() for name, state in states for key, value in state.items()}


def _names_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Yield parameter names in the order in which an optimizer's state_dict numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)]


@contextlib.contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """Yield the path or, if it is not UTF-8, that of a temporary link to it: safetensors reads UTF-8 names only."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / path.name
            link.symlink_to(path.absolute())
            yield str(link)
    else:
        yield str(path)
