"""Train a Transformer on text: configuration, data, the loop and the run directory it writes."""

from typing import TYPE_CHECKING

from ..common.lazy import names_from
from .config import TrainConfig, load_config

if TYPE_CHECKING:
    from .run_directory import LoadedRun, load_run

__all__ = ["LoadedRun", "TrainConfig", "load_config", "load_run"]

# Imported on use: the command line needs only the configuration for --help and errors in options.
_HOMES = dict.fromkeys(("LoadedRun", "load_run"), "training.run_directory")
__getattr__, __dir__ = names_from(__name__, _HOMES)
