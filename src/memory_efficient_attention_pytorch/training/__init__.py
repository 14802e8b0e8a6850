"""Training a Transformer on text: configuration, data, the loop and what it leaves in a run directory."""

from typing import Any

from .config import TrainConfig, load_config

__all__ = ["LoadedRun", "TrainConfig", "load_config", "load_run"]


def __getattr__(name: str) -> Any:
    # Loaded on use: the command line needs the configuration alone to answer --help and mistakes.
    if name in ("LoadedRun", "load_run"):
        from . import run_directory

        return getattr(run_directory, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
