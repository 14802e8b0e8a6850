"""Write and read a run directory.

RUN/config.toml                          the configuration, every choice resolved
RUN/tokenizer.json                       unless the tokens are bytes
RUN/data/                                the tokenised text, see `data`
RUN/checkpoints/step-00000100/           model.safetensors, optimizer.safetensors, state.json, see `checkpoints`
RUN/metrics.jsonl, RUN/loss.png          measurements and their plot
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..models.transformer import Transformer
from .checkpoints import Checkpoints, load_weights
from .config import TrainConfig, dump_config, load_config
from .files import WRITE_ERRORS, RunError, quoted, write_atomically
from .model import build_model
from .tokenizers import ByteTokenizer, SubwordTokenizer, Tokenizer

_FILES = ("config.toml", "tokenizer.json", "standard-input.txt", "metrics.jsonl", "loss.png")


class LoadedRun(NamedTuple):
    """A trained model in eval mode, its tokenizer and the configuration of its run.

    Examples:
        >>> from memory_efficient_attention_pytorch.training import LoadedRun, load_run
        >>> loaded = load_run(run, checkpoint="last")
        >>> isinstance(loaded, LoadedRun), loaded.tokenizer.num_tokens == loaded.model.num_tokens
        (True, True)
    """

    model: Transformer
    tokenizer: Tokenizer
    config: TrainConfig


class BusyError(ValueError):
    """Raised when another process is training in a run directory, whose files are that run's."""


class RunDirectory:
    """The paths in a run directory."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.tokenizer = self.path / "tokenizer.json"
        self.data = self.path / "data"
        self.standard_input = self.path / "standard-input.txt"
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.metrics = self.path / "metrics.jsonl"
        self.plot = self.path / "loss.png"
        self.tensorboard = self.path / "tensorboard"

    @classmethod
    def make(cls, path: Path, config: TrainConfig) -> tuple["RunDirectory", list[Path]]:
        """Make the run directory with its configuration; also return the directories that were made for it.

        Raises ValueError if it is not empty or cannot be written.
        """
        run, made = cls(path), [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
        begun = False
        try:
            if not made and any(path.iterdir()):
                resume = f"go on with it, mea train --resume {run.quoted}, or" if run.config.exists() else "please"
                raise ValueError(f"out: {path} is not empty: {resume} choose another --out")
            path.mkdir(parents=True, exist_ok=not made)
            run.config.touch(exist_ok=False)  # of two starts in one directory the second ends here
            begun = True
            write_atomically(run.config, dump_config(config))
        except OSError as error:
            if begun:
                run.config.unlink(missing_ok=True)
            _remove_empty(made)
            raise ValueError(
                f"out: cannot write to {path}: {error.strerror}; choose another place with --out"
            ) from error
        return run, made

    def unmake(self, made: list[Path]) -> None:
        """Remove the files of a run that cannot be trained, and the directories made for it."""
        left = [*_FILES, *(f".{name}.partial" for name in _FILES), ".lock", "tensorboard", "data", ".data.partial"]
        for path in (self.path / name for name in left):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _remove_empty(made)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory, so that no second process trains in it; the system unlocks it when the process ends.

        Raises BusyError if another process holds it.
        """
        from filelock import FileLock, Timeout

        with contextlib.ExitStack() as stack:
            with self.clear_about_writing():
                try:
                    stack.enter_context(FileLock(self.path / ".lock", timeout=0))
                except Timeout as error:
                    message = f"another process is training in {self.path}: wait for it or stop it"
                    raise BusyError(message) from error
            yield

    @contextlib.contextmanager
    def clear_about_writing(self, kept: Callable[[], str] | None = None) -> Iterator[None]:
        """Turn a failed write into a RunError that says what was ``kept`` and how to resume."""
        try:
            yield
        except BrokenPipeError:
            raise
        except WRITE_ERRORS as error:
            words = f"; {kept()}" if kept else ""
            raise RunError(
                f"cannot write to {self.path} ({error}){words}: make room or make it writable, and go on with: "
                f"mea train --resume {self.quoted}"
            ) from error

    @property
    def quoted(self) -> str:
        """The path quoted for a shell, for commands that the user may copy."""
        return quoted(self.path)

    def load_config(self) -> TrainConfig:
        """Read the configuration. Raises ValueError if this is no run directory, or has another format."""
        if not self.path.is_dir():
            raise ValueError(f"there is no run directory {self.path}")
        if not self.config.is_file():
            raise ValueError(f"{self.path} is not a run directory: it has no config.toml; `mea train` makes one")
        return load_config(self.config)

    def load_tokenizer(self) -> Tokenizer:
        """Load the run's tokenizer: its tokenizer.json, or bytes if there is none."""
        return SubwordTokenizer(self.tokenizer) if self.tokenizer.is_file() else ByteTokenizer()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # missing, or someone's files are in it
            folder.rmdir()


def load_run(
    path: Path | str,
    *,
    checkpoint: str = "best",
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = warnings.warn,
) -> LoadedRun:
    """Load what a run trained: the model (in eval mode, fp32), its tokenizer and its configuration.

    path: the run directory, finished or not.
    checkpoint: "best" (lowest validation loss) or "last". A checkpoint that is truncated or altered is skipped, and the
        next one in that order is taken.
    device: where the model is loaded to.
    report: called with a sentence on each checkpoint that is skipped.

    Raises ValueError if `path` is no run directory, has another format, or holds no intact checkpoint.

    Examples:
        >>> from memory_efficient_attention_pytorch.training import load_run
        >>> model, tokenizer, config = load_run(run)  # a directory that `mea train` wrote
        >>> model.training
        False
    """
    run = RunDirectory(path)
    config = run.load_config()
    tokenizer = run.load_tokenizer()
    found = run.checkpoints.find(checkpoint, report)
    if found is None:
        raise ValueError(f"{run.path} holds no intact checkpoint: train it first, or go on with mea train --resume")
    model = build_model(config, tokenizer.num_tokens)
    load_weights(model, found)
    return LoadedRun(model.to(device).eval(), tokenizer, config)
