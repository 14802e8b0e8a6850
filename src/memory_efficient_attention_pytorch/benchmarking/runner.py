"""Run a comparison: each system in a fresh process, in turn, with progress and the time left."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..common.errors import require
from ..common.sizes import available_memory
from ..planner.plan import chosen_device
from .measure import Measurement, measure_peak
from .results import Results, Run, begin
from .schedule import Forecast, Job, Settings, schedule
from .systems import System

MEMORY_SHARE = 0.9  # of available memory; beyond it an allocation fails, before the machine itself runs out
STOP_AFTER = 4  # times the step limit, for a run that takes longer than forecast


@dataclass(frozen=True)
class Progress:
    """A finished run, the number of runs done and in all, and the seconds expected for the rest (None: unknown)."""

    run: Run
    done: int
    total: int
    seconds_left: float | None


def compare(
    settings: Settings,
    systems: Sequence[System],
    output: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Results:
    """Run everything that ``settings`` ask for and return the results; ``output`` (JSON) is rewritten after every run.

    Runs that do not fit in memory, take too long or fail are part of the results.

    Raises:
        ValueError: memory cannot be measured on ``settings.device`` here.
    """
    _require_measurable(settings.device)
    results = begin(settings, systems)
    forecast = Forecast(settings.patience)
    jobs = schedule(settings, systems)
    for done, job in enumerate(jobs, start=1):
        began = time.perf_counter()
        run = run_job(job, settings, forecast.step_seconds(job), results.runs)
        if run.outcome == "measured":
            forecast.learn(job, median(run.seconds), 1 + len(run.seconds), time.perf_counter() - began)
        results.runs.append(run)
        results.save(output)
        left = sum(forecast.run_seconds(later, settings.step_limit) for later in jobs[done:])
        on_progress(Progress(run, done, len(jobs), left if forecast.step_seconds(job) is not None else None))
    return results


def run_job(job: Job, settings: Settings, expected_seconds: float | None = None, earlier: Sequence[Run] = ()) -> Run:
    """Run one job in a fresh process, unless it is expected to exceed the limits."""

    def ended(outcome: str, note: str = "", **readings: Any) -> Run:
        return Run(job.experiment, job.round, job.system.name, job.shape, outcome, note, **readings)

    if expected_seconds is not None and expected_seconds > settings.step_limit:
        return ended(
            "too_slow", f"a step would take about {expected_seconds:.0f} s; the limit is {settings.step_limit:.0f} s"
        )
    if any(_implies_too_large(run, job) for run in earlier):
        return ended("out_of_memory", "a shorter sequence did not fit")
    try:
        measurement, readings = _measure(job, settings)
    except MemoryError as error:
        return ended("out_of_memory", _last_line(error))
    except subprocess.TimeoutExpired as error:
        return ended("too_slow", f"stopped after {error.timeout:.0f} s")
    except RuntimeError as error:
        return ended("failed", _last_line(error))
    return ended(
        "measured",
        peak_bytes=measurement.peak_bytes,
        seconds=tuple(readings["seconds"] or [readings["first_seconds"]]),
        loss=readings["loss"],
        parameters=readings["parameters"],
    )


def _measure(job: Job, settings: Settings) -> tuple[Measurement, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        measurement = measure_peak(
            job.system.target,
            {
                "system": job.system.name,
                "shape": asdict(job.shape),
                "device": settings.device,
                "repeats": job.repeats,
                "patience": settings.patience,
                "report": str(report),
                "keep_freed": settings.keep_freed,
            },
            device=settings.device,
            threads=settings.threads,
            limit_bytes=_memory_limit(settings.device),
            timeout=STOP_AFTER * settings.step_limit,
        )
        return measurement, json.loads(report.read_text())


def _require_measurable(device: str) -> None:
    kind = chosen_device(device, {}).type
    if kind == "cuda":
        require(torch.cuda.is_available(), "device", "an available device", f"{device} without a usable CUDA device")
    else:
        require(kind == "cpu", "device", "cpu or cuda", device)
        require(Path("/proc/meminfo").exists(), "device", "cuda, or cpu on Linux, where /proc reports memory", device)


def _implies_too_large(run: Run, job: Job) -> bool:
    return (
        run.outcome == "out_of_memory"
        and run.system == job.system.name
        and run.shape.seq_len < job.shape.seq_len
        and replace(run.shape, seq_len=job.shape.seq_len) == job.shape
    )


def _memory_limit(device: str) -> int | None:
    """Return the bytes that a run on the CPU may take; None for a CUDA device, which has its own limit."""
    return int(MEMORY_SHARE * available_memory()) if torch.device(device).type == "cpu" else None


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
