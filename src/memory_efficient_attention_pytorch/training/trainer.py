"""The training loop: steps, validations, samples and checkpoints, on accelerate."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..models.generation import AutoregressiveWrapper
from .checkpoints import Checkpoint, TrainState, load_optimizer, load_weights
from .config import TrainConfig
from .data import Batches, Corpus, evaluation_starts, shifted
from .files import RunError
from .interruption import Interrupted, Interruption
from .model import build_model
from .optimizer import adamw, learning_rate
from .plot import plot_losses
from .processes import ProcessMesh
from .resources import forget_pages, memory_now, memory_peak
from .run_directory import RunDirectory
from .sharding import shard, whole
from .tracking import Callback, OutputError, Record, Sample, Step, Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

_PROMPT_TOKENS = 48


class Trainer:
    """Trains a model from a run directory's configuration, text and, if given, checkpoint.

    Everything a step does follows from the weights, the optimizer state, the seed and the step's number: batches and
    dropout have no state of their own. So a resumed run repeats an uninterrupted one bit for bit on the same machine.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        run: RunDirectory,
        config: TrainConfig,
        callbacks: Sequence[Callback],
        checkpoint: Checkpoint | None,
    ):
        self.accelerator, self.run, self.config, self.callbacks = accelerator, run, config, callbacks
        self.processes, self.corpus = ProcessMesh(accelerator, config), Corpus(run.data)
        self.tokenizer = run.load_tokenizer()
        self.state = checkpoint.state if checkpoint else TrainState()
        self.saved_step = self.state.step if checkpoint else None
        self.batches = Batches(self.corpus.train, config, self.processes.data_size, self.processes.data_rank)
        self._check_position()

        torch.manual_seed(config.seed)
        # No process ever holds the whole of a sharded model that is filled from a checkpoint.
        with torch.device("meta") if checkpoint and config.shard else contextlib.nullcontext():
            self.model = build_model(config, self.tokenizer.num_tokens)
        if config.shard:
            shard(self.model, accelerator)
        if checkpoint:
            load_weights(self.model, checkpoint)
        self.wrapped: nn.Module = self.model if config.shard else accelerator.prepare(self.model)
        self.optimizer = accelerator.prepare(adamw(self.model.parameters(), config))
        if checkpoint:
            load_optimizer(self.model, self.optimizer.optimizer, checkpoint)
            if accelerator.scaler is not None and self.state.scaler is not None:
                accelerator.scaler.load_state_dict(self.state.scaler)
        self.seconds_per_step: float | None = None
        self.draw_again = 0.0

    def train(self) -> TrainState:
        """Train to the last step and return the final state.

        Raises Interrupted when a signal asks for it; RunError when the loss is not finite or a write fails, with the
        last good checkpoint kept; BrokenPipeError when a callback's output was closed, and OutputError when it cannot
        be written. A checkpoint is saved first on Interrupted, and in a single process on the last two.
        """
        try:
            with self.run.clear_about_writing(self._last_good), Interruption() as interruption:
                if self.saved_step is None:  # there was no checkpoint
                    self._validate()
                while self.state.step < self.config.steps:
                    self._step(interruption)
                    self._after_step(interruption)
                self._draw(at_last=True)
            return self.state
        except (BrokenPipeError, OutputError):
            # The output is gone. With several processes this one cannot get the others to save at the same step.
            if self.accelerator.num_processes == 1:
                self.save()
            raise

    def _step(self, interruption: Interruption) -> None:
        began = time.perf_counter()
        config, step = self.config, self.state.step
        torch.manual_seed(_seed_of(config.seed, step, self.processes.data_rank))
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.wrapped.train()
        losses = []
        for x, labels in self.batches(step):
            with self.accelerator.accumulate(self.wrapped):
                loss = self._loss(self.wrapped, x, labels)
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip or math.inf)
                    mean, norm = self._agree(torch.stack(losses).mean(), whole(norm), interruption)
                    self._check_finite(mean, norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self._count_step(mean, norm, rate, time.perf_counter() - began)

    def _loss(self, model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the windows; where their tokens are divided, each process computes its part."""
        x, labels = self.processes.own(x, labels)
        with self.processes.entered(), self.accelerator.autocast():
            loss: torch.Tensor = model(x.to(self.accelerator.device), labels=labels.to(self.accelerator.device))
        return loss

    def _agree(self, loss: torch.Tensor, norm: torch.Tensor, interruption: Interruption) -> tuple[float, float]:
        """Return the mean loss of all processes and the norm; share a signal that reached one process with all."""
        if self.accelerator.num_processes > 1:
            number = float(interruption.signal or 0)
            every = self.accelerator.gather(torch.stack([loss.float(), loss.new_tensor(number).float()])[None])
            loss = every[:, 0].mean()
            interruption.note(int(every[:, 1].max()))
        return loss.item(), float(norm)

    def _check_finite(self, loss: float, norm: float) -> None:
        # The fp16 scaler expects gradients to overflow now and then, and skips those steps by itself.
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            return
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient's norm became {norm}"
        raise self._diverged(f"{what} at step {self.state.step + 1}")

    def _diverged(self, what: str) -> RunError:
        # A third of the rate that diverged, but no more than the default.
        rate = min(self.config.learning_rate / 3, TrainConfig.learning_rate)
        return RunError(
            f"{what}; {self._last_good()}; try a smaller learning rate: "
            f"mea train --resume {self.run.quoted} --learning-rate {rate:.1g}"
        )

    def _count_step(self, loss: float, norm: float, rate: float, seconds: float) -> None:
        tokens = self.batches.windows_per_step * self.config.seq_len
        self.state = dataclasses.replace(
            self.state,
            step=self.state.step + 1,
            tokens=self.state.tokens + tokens,
            seconds=self.state.seconds + seconds,
            validation_loss=None,
            windows_per_step=self.batches.windows_per_step,
        )
        # Smoothed over about ten steps, so that the time left does not jump.
        self.seconds_per_step = (
            seconds if self.seconds_per_step is None else 0.9 * self.seconds_per_step + 0.1 * seconds
        )
        forget_pages(self.corpus.train)
        now = memory_now(self.accelerator.device)
        self._log(
            Step(
                step=self.state.step,
                tokens=self.state.tokens,
                loss=loss,
                bits_per_byte=self._bits_per_byte(loss),
                learning_rate=rate,
                gradient_norm=norm,
                tokens_per_second=tokens / self.seconds_per_step,
                seconds_left=(self.config.steps - self.state.step) * self.seconds_per_step,
                memory_now=now,
                memory_peak=max(now, memory_peak(self.accelerator.device)),
            )
        )

    def _after_step(self, interruption: Interruption) -> None:
        config, step = self.config, self.state.step
        last = step == config.steps
        improved = self._validate() if last or step % config.evaluate_every == 0 else False
        if config.sample_every and (last or step % config.sample_every == 0):
            self._sample()
        if last or improved or interruption.signal or step % config.checkpoint_every == 0:
            self.save()
        if interruption.signal and not last:
            self._draw(at_last=True)
            raise Interrupted(interruption.signal, step, self.run, main=self.accelerator.is_main_process)

    def _validate(self) -> bool:
        """Measure the loss over the fixed validation set; return whether it is the lowest so far."""
        loss = self.measure(self.corpus.validation)
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss became {loss} at step {self.state.step}")
        improved = self.state.best_loss is None or loss < self.state.best_loss
        best = loss if improved else self.state.best_loss
        self.state = dataclasses.replace(self.state, validation_loss=loss, best_loss=best)
        bits = self._bits_per_byte(loss)
        self._log(Validation(self.state.step, self.state.tokens, loss, bits, improved))
        self._draw()
        return improved

    @torch.no_grad()
    def measure(self, tokens: np.ndarray) -> float:
        """Return the mean loss, in nats per token, over evenly spread windows of `tokens`; processes share the work."""
        starts, length = evaluation_starts(tokens, self.config)
        groups = self.processes.data_size
        mine = starts[self.processes.data_rank :: groups]
        total = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        # The first process has the most windows; with sharded weights all processes must run each forward pass.
        most = len(starts[::groups]) if self.config.shard else len(mine)
        for first in range(0, most, self.config.batch_size):
            batch = mine[first : first + self.config.batch_size]
            x, labels = shifted(tokens, batch if len(batch) else starts[:1], length)
            loss = self._loss(self.model, x, labels)
            if not len(batch):
                continue
            total += torch.tensor([loss.item() * labels.numel(), labels.numel()], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total.float().to(self.accelerator.device)[None]).sum(0)
        forget_pages(tokens)
        return (total[0] / total[1]).item()

    def _sample(self) -> None:
        if not (self.accelerator.is_main_process or self.config.shard):
            return  # with sharded weights all processes must generate, and generate the same
        prompt = self.corpus.validation[:_PROMPT_TOKENS].astype(np.int64)
        torch.manual_seed(_seed_of(self.config.seed, self.state.step, 0))
        self.model.eval()
        start = torch.from_numpy(prompt)[None].to(self.accelerator.device)
        tokens = AutoregressiveWrapper(self.model).generate(
            start, self.config.sample_tokens, temperature=0.8, filter_thres=0.9
        )
        text = self.tokenizer.decode(tokens[0].tolist())
        self._log(Sample(self.state.step, self.tokenizer.decode(prompt.tolist()), text))

    def _log(self, record: Record) -> None:
        for callback in self.callbacks:
            callback.log(record)

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one, and remove those that are not kept."""
        if self.saved_step == self.state.step:
            return
        main = self.accelerator.is_main_process
        if main and self.accelerator.scaler is not None:
            self.state = dataclasses.replace(self.state, scaler=self.accelerator.scaler.state_dict())
        if main or self.config.shard:
            self.run.checkpoints.save(self.model, self.optimizer.optimizer, self.state)
        if main:
            self.run.checkpoints.prune(self.config.keep)
        self.saved_step = self.state.step
        self.accelerator.wait_for_everyone()

    def _draw(self, *, at_last: bool = False) -> None:
        """Update the plot, unless drawing would take more than about a twentieth of the time."""
        now = time.perf_counter()
        if self.accelerator.is_main_process and (at_last or now > self.draw_again):
            plot_losses(self.run.metrics, self.run.plot)
            done = time.perf_counter()
            self.draw_again = done + 20 * (done - now)

    def _bits_per_byte(self, loss: float) -> float:
        return loss / math.log(2) / self.corpus.info.bytes_per_token

    def _last_good(self) -> str:
        if self.saved_step is None:
            return "no checkpoint had been written yet"
        return f"the checkpoint of step {self.saved_step} is kept"

    def _check_position(self) -> None:
        before, now = self.state.windows_per_step, self.batches.windows_per_step
        if before not in (0, now):
            raise ValueError(
                f"the run took {before} windows a step and would now take {now}: "
                "choose --batch-size, --accumulation and the processes so that their product stays the same"
            )


def _seed_of(*numbers: int) -> int:
    """Hash several numbers into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
