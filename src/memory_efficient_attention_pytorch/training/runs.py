"""Start or resume a run: everything between the options and the loop."""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from ..common.errors import brought_by
from .budget import Memory, fastest_that_fits, least_free, preload, within_budget
from .checkpoints import Checkpoint, TrainState
from .config import TrainConfig, dump_config
from .data import Corpus, check_length
from .description import describe
from .files import ElsewhereError, RunError, write_atomically
from .model import build_model
from .optimizer import learning_rate
from .processes import check_division
from .resources import keep_freed_blocks, memory_peak, pick_precision, resolve, return_freed_blocks
from .run_directory import BusyError, RunDirectory
from .text import prepare_text
from .tokenizers import ByteTokenizer, SubwordTokenizer
from .tracking import Callback, MetricsFile, TensorBoardFile
from .trainer import Trainer
from .watch import watched

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

RUNS = Path("runs")
"""The default parent of run directories."""

_CHANGEABLE = {
    *("steps", "batch_size", "accumulation", "learning_rate", "final_learning_rate", "warmup_steps", "weight_decay"),
    *("clip", "device", "shard", "context_parallel", "head_chunks", "ff_chunks", "loss_chunk_size", "memory_budget"),
    *("evaluate_every", "evaluation_windows", "sample_every", "sample_tokens", "checkpoint_every", "keep"),
    "tensorboard",
}


class Outcome(NamedTuple):
    """A finished run.

    parameters: their number. main: whether this is the main process, which reports for all. memory: predicted and
    measured memory, if the run had a budget.
    """

    run: RunDirectory
    config: TrainConfig
    state: TrainState
    parameters: int
    main: bool
    memory: Memory | None = None


def start_run(config: TrainConfig, out: Path | str | None, make_display: Callable[[bool], Callback]) -> Outcome:
    """Make a run directory and train to the end.

    out: the directory, new or empty; None for the next number under `runs/`. make_display: called in each process with
    whether it is the main one. Raises what `Trainer.train` raises, and ValueError for what cannot be trained; then no
    directory is left behind.
    """
    # Absolute, so that the run can be resumed from anywhere even if it was killed before it had read its text.
    text: dict[str, Any] = {"data": tuple(name if name == "-" else str(Path(name).absolute()) for name in config.data)}
    if config.tokenizer is not None:
        text["tokenizer"] = str(Path(config.tokenizer).absolute())
    config = config.updated(text)
    with _joined(config, make_display) as accelerator:
        config, memory, line = _settle(accelerator, config, _num_tokens(config))
        path = Path(out) if out is not None else _on_main(accelerator, _next_number)
        run, made = _on_main(accelerator, lambda: RunDirectory.make(path, config))
        return _train(accelerator, run, config, memory, line, make_display, refused=lambda: run.unmake(made))


def resume_run(path: Path | str, changes: Mapping[str, Any], make_display: Callable[[bool], Callback]) -> Outcome:
    """Resume a run from its last intact checkpoint, bit for bit as if it had never stopped.

    changes: options to change from here on; unchanged values are ignored. Raises ValueError if `path` is not a run
    directory of this format, if none of its checkpoints is intact, or if an option cannot change within a run, and what
    `Trainer.train` raises.
    """
    run = RunDirectory(path)
    before = run.load_config()
    config = before.updated(changes)
    config = config.updated({key: getattr(before, key) for key in changes if _as_before(before, config, key)})
    for key in changes:
        if key not in _CHANGEABLE and getattr(config, key) != getattr(before, key):
            raise ValueError(
                f"{key} is {getattr(before, key)!r} in {run.path} and cannot change within a run: start a new one"
            )
    with _joined(config, make_display) as accelerator:
        # A run that was killed before it had read its text may have no tokenizer yet.
        num_tokens = run.load_tokenizer().num_tokens if run.data.is_dir() else _num_tokens(config)
        config, memory, line = _settle(accelerator, config, num_tokens, settled=True)
        return _train(accelerator, run, config, memory, line, make_display, before=before)


def _as_before(before: TrainConfig, now: TrainConfig, key: str) -> bool:
    """Return whether an option changes nothing: `auto` keeps the earlier choice, paths may differ in form."""
    if key == "data":
        return [os.path.realpath(name) for name in before.data] == [os.path.realpath(name) for name in now.data]
    if key == "tokenizer" and before.tokenizer and now.tokenizer:
        return os.path.realpath(before.tokenizer) == os.path.realpath(now.tokenizer)
    return key == "precision" and now.precision == "auto"


def _settle(
    accelerator: "Accelerator", config: TrainConfig, num_tokens: int, *, settled: bool = False
) -> tuple[TrainConfig, Memory | None, str]:
    """Make every open choice, for the memory budget or the free memory.

    Returns the configuration, the budget's memory, and a line on what was chosen for it or for free memory, or "".
    settled: the run is resumed; whatever is free now, it computes as before.
    """
    device, processes = accelerator.device, accelerator.num_processes
    if config.memory_budget is None:
        fit = ""
        if settled:
            config = resolve(config, device)
        else:
            free = least_free(accelerator)
            config, fit = _on_main(
                accelerator, lambda: fastest_that_fits(config, device, num_tokens, free=free, processes=processes)
            )
        if config.reversible:
            return_freed_blocks()
        else:
            keep_freed_blocks()  # a run that stores activations has the memory
        return config, None, f"memory: {fit}" if fit else ""
    preload(device)
    free = least_free(accelerator) if config.memory_budget == "auto" else None
    config, memory = _on_main(
        accelerator,
        lambda: within_budget(config, device, num_tokens, processes=processes, settled=settled, free=free),
    )
    accelerator.gradient_accumulation_steps = config.accumulation
    return config, memory, memory.announcement()


def _num_tokens(config: TrainConfig) -> int:
    """Return the size of the vocabulary, before the tokenizer is made."""
    if config.tokenizer is not None:
        return SubwordTokenizer(config.tokenizer).num_tokens
    return config.vocab_size or ByteTokenizer.num_tokens


def latest_run() -> Path:
    """Return the run under `runs/` that was written to last. Raises ValueError if there is none."""
    found = [path.parent for path in RUNS.glob("*/config.toml")]
    if not found:
        raise ValueError(f"there is no run in {RUNS}/ to go on with: name one, mea train --resume RUN")
    return max(found, key=lambda path: path.stat().st_mtime)


def _train(
    accelerator: "Accelerator",
    run: RunDirectory,
    config: TrainConfig,
    memory: Memory | None,
    line: str,
    make_display: Callable[[bool], Callback],
    *,
    before: TrainConfig | None = None,
    refused: Callable[[], None] = lambda: None,
) -> Outcome:
    """Prepare everything and train to the end.

    line: on the memory that its settings take. before: the earlier configuration of a resumed run. refused: called in
    the main process if the run turns out not to be trainable.
    """
    main = accelerator.is_main_process
    with contextlib.ExitStack() as stack:
        try:
            display = make_display(main)
            stack.callback(display.close)
            trainer = _make_trainer(stack, accelerator, run, config, display, before)
        except (RunError, BusyError, BrokenPipeError):
            raise  # the run can be resumed, or is another process's
        except Exception:
            if main:
                refused()
            raise
        if main:
            # Only now is it certain that the run works with the changed options.
            with run.clear_about_writing():
                write_atomically(run.config, dump_config(config))
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        lines = [describe(trainer, parameters), *([line] if line else [])]
        display.started("\n".join(lines), run.path, trainer.state.step, config.steps)
        state = trainer.train()
        if memory is not None:
            memory = dataclasses.replace(memory, measured=memory_peak(accelerator.device))
        return Outcome(run, config, state, parameters, main, memory)


def _make_trainer(
    stack: contextlib.ExitStack,
    accelerator: "Accelerator",
    run: RunDirectory,
    config: TrainConfig,
    display: Callback,
    before: TrainConfig | None,
) -> Trainer:
    """Prepare the run directory, whose lock and files ``stack`` closes, and return the loop."""
    files: list[Callback] = []

    def prepare() -> Checkpoint | None:
        stack.enter_context(run.locked())
        with run.clear_about_writing():
            found = _prepare(run, config, display, before)
            first_step = found.state.step if found else -1
            files.append(MetricsFile(run.metrics, first_step))
            if config.tensorboard:
                files.append(TensorBoardFile(run.tensorboard, first_step))
        return found

    checkpoint = _on_main(accelerator, prepare)
    for file in files:
        stack.callback(file.close)
    return Trainer(accelerator, run, config, [*files, display], checkpoint)


def _prepare(
    run: RunDirectory, config: TrainConfig, display: Callback, before: TrainConfig | None
) -> Checkpoint | None:
    """Write everything that the loop needs to disk; return the checkpoint to resume from, if any."""
    with torch.device("meta"):
        build_model(config, num_tokens=256)  # raises for an impossible shape before the text is read
    prepare_text(run, config, display)
    check_length(Corpus(run.data), config.seq_len)
    return None if before is None else _last_checkpoint(run, config, display, before)


def _last_checkpoint(
    run: RunDirectory, config: TrainConfig, display: Callback, before: TrainConfig
) -> Checkpoint | None:
    """Return a resumed run's last intact checkpoint; rename damaged ones after it."""
    if renamed := run.checkpoints.renamed():
        raise ValueError(
            f"in {run.checkpoints.root} {', '.join(renamed)}, and nothing there was changed: "
            "give it the name of its step, or move it away"
        )
    damaged: list[str] = []
    checkpoint = run.checkpoints.find("last", damaged.append)
    if checkpoint is None and damaged:
        raise ValueError(
            f"{run.path} holds no intact checkpoint, and nothing there was changed: {'; '.join(damaged)}. "
            "Restore one, or move them away to begin at step 0"
        )
    for flaw in damaged:
        display.notice(f"{flaw}: it is skipped, not removed")
    run.checkpoints.remove_unfinished()
    if checkpoint is None:
        display.notice(f"{run.path} holds no checkpoint yet: beginning at step 0")
        return None
    step = checkpoint.state.step
    run.checkpoints.set_aside_after(step)
    planned, now = (learning_rate(each, step) for each in (before, config))
    if step < config.steps and abs(now - planned) > 0.1 * planned:
        display.notice(
            f"the learning rate goes on at {now:.2g}, where the unchanged run would be at {planned:.2g}: "
            "--steps, --learning-rate, --warmup-steps and --final-learning-rate shape it together"
        )
    return checkpoint


@contextlib.contextmanager
def _joined(config: TrainConfig, make_display: Callable[[bool], Callback]) -> Iterator["Accelerator"]:
    """Join the processes that train together for the length of the block; if one dies, all end."""
    accelerator = _make_accelerator(config)
    try:
        with watched(accelerator, make_display(False).notice):
            check_division(accelerator.num_processes, config)
            yield accelerator
    finally:
        accelerator.end_training()


def _make_accelerator(config: TrainConfig) -> "Accelerator":
    with brought_by("train"):
        import matplotlib  # noqa: F401  for the picture of the losses
        import tomli_w  # noqa: F401  for the run's configuration
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
    _refuse_other_engines()
    _prefer_deterministic_kernels()
    device = None if config.device == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    precision = pick_precision(config, device or torch.device("cpu"))
    return Accelerator(
        cpu=device is None,
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.accumulation, sync_with_dataloader=False
        ),
        # The other processes wait while the main one tokenises the text, which may take hours.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))],
    )


def _refuse_other_engines() -> None:
    """Raise ValueError if accelerate's own configuration divides the model or the tokens."""
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise ValueError(
                f"accelerate is configured to use {engine}, and mea train divides the work by itself: launch it with "
                "--multi_gpu alone and choose --shard and --context-parallel"
            )


def _prefer_deterministic_kernels() -> None:
    """Choose deterministic CUDA kernels, so that the same seed gives the same weights.

    PyTorch warns where it has none, and where it leaves out those that it has, as attention's backward does unless
    everything has to be deterministic. CPU kernels are deterministic anyway.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Otherwise every new tensor would be filled, to expose the use of uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _on_main(accelerator: "Accelerator", work: Callable[[], T]) -> T:
    """Run `work` in the main process, return its result in all; if it raises, the others raise ElsewhereError."""
    from accelerate.utils import broadcast_object_list

    result: list[Any] = [None, None]  # what work returned, and if it failed whether by a mistake of the user's
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except Exception as error:
            failure, result[1] = error, isinstance(error, ValueError)
    broadcast_object_list(result)
    if failure is not None:
        raise failure
    if result[1] is not None:
        raise ElsewhereError(mistake=result[1])
    found: T = result[0]
    return found


def _next_number() -> Path:
    numbers = [int(path.name) for path in RUNS.glob("*") if path.name.isdecimal()]
    return RUNS / str(max(numbers, default=0) + 1)
