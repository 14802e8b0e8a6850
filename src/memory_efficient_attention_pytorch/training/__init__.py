"""Training a Transformer on text: configuration, data, the loop and what it leaves in a run directory."""

from typing import TYPE_CHECKING

from ..common.lazy import names_from
from .config import TrainConfig, load_config

if TYPE_CHECKING:
    from .run_directory import LoadedRun, load_run

__all__ = ["LoadedRun", "TrainConfig", "load_config", "load_run"]

# Loaded on use: the command line needs the configuration alone to answer --help and mistakes.
_HOMES = dict.fromkeys(("LoadedRun", "load_run"), "training.run_directory")
__getattr__, __dir__ = names_from(__name__, _HOMES)
