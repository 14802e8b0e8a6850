"""Store the results of a comparison, with machine, versions and date, in one JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..common.errors import require
from ..common.version import __version__
from ..training.files import write_atomically
from .schedule import Settings
from .shape import Shape
from .systems import System

FORMAT = 1
OUTCOMES = ("measured", "out_of_memory", "too_slow", "failed")


@dataclass(frozen=True)
class Run:
    """One system at one shape in one round. ``outcome`` is one of ``OUTCOMES``; ``note`` says why it is not measured.

    ``seconds`` are those of the timed steps after the first; a run so long that it had only one step has that step's.
    """

    experiment: str
    round: int
    system: str
    shape: Shape
    outcome: str
    note: str = ""
    peak_bytes: int | None = None
    seconds: tuple[float, ...] = ()
    loss: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        require(self.outcome in OUTCOMES, "outcome", f"one of {', '.join(OUTCOMES)}", self.outcome)


@dataclass
class Results:
    """All runs of one comparison, with date, machine, versions and settings."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: Settings
    labels: dict[str, str]
    runs: list[Run] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file, making its folder; an interrupted write leaves the old one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a saved file.

        Raises:
            ValueError: the file is not such a file, or has another format.
        """
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"path: expected a benchmark result of format {FORMAT}, got {path}")
        settings, runs = content.pop("settings"), content.pop("runs")
        settings |= {name: tuple(settings[name]) for name in ("lengths", "depths", "vocabularies")}
        return cls(
            settings=Settings(**settings | {"base": Shape(**settings["base"])}),
            runs=[Run(**run | {"shape": Shape(**run["shape"]), "seconds": tuple(run["seconds"])}) for run in runs],
            **content,
        )


def begin(settings: Settings, systems: Sequence[System]) -> Results:
    """Return results without runs, dated now."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ours": __version__,
    }
    for system in systems:
        versions |= system.versions()
    return Results(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=describe_machine(settings.device),
        versions=versions,
        settings=settings,
        labels={system.name: system.label for system in systems},
    )


def describe_machine(device: str) -> dict[str, Any]:
    """Return processor, usable cores, memory, system, and the CUDA device if one is used. No host name."""
    machine: dict[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_memory_bytes"] = properties.total_memory
    return machine


def provenance() -> dict[str, Any]:
    """Return what a record of measurements on the CPU begins with: the machine, PyTorch's version and the date."""
    return {"machine": describe_machine("cpu"), "torch": torch.__version__, "date": str(datetime.date.today())}


def describe_provenance(record: Mapping[str, Any]) -> str:
    """Return in words what ``provenance`` gave a record, and how many ``threads`` it names, if it does."""
    machine, threads = record["machine"], f"{record['threads']} threads on " if "threads" in record else ""
    return f"{machine['processor']}, {threads}{machine['cores']} cores, torch {record['torch']}, {record['date']}"


def describe_place(machine: Mapping[str, Any]) -> str:
    """Return in words the GPU of ``describe_machine``, or else its processor and cores, and the memory of that."""
    place = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    return f"{place}, {machine.get('gpu_memory_bytes', machine['memory_bytes']) / 1024**3:.0f} GiB"


def processor() -> str:
    """Return the processor's name, family and model, since different chips may share a name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or "unknown"
    first = info.read_text().partition("\n\n")[0]
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name", platform.processor() or "unknown")
    return f"{name}, family {facts['cpu family']}, model {facts['model']}" if "cpu family" in facts else name
