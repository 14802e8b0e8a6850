"""Handle signals that ask a run to end: noted during a step, acted on between steps."""

import signal
import threading
import time
from types import FrameType
from typing import Self

from .run_directory import RunDirectory


class Interruption:
    """Notes SIGINT, SIGTERM and SIGHUP in `signal` while entered; SIGINT again, a second later, stops at once.

    Within that second it is the same request: a launcher forwards what the terminal has sent to all processes already.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                # A signal that is ignored (nohup) stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def note(self, number: int) -> None:
        """Record a signal by its number; 0 for none."""
        if number and self.signal is None:
            self.signal, self._noted_at = signal.Signals(number), time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None and time.monotonic() - self._noted_at > 1:
            raise KeyboardInterrupt
        self.note(number)


class Interrupted(Exception):
    """Raised when a signal ended a run early; its state is saved. main: whether this is the main process."""

    def __init__(self, number: signal.Signals, step: int, run: RunDirectory, *, main: bool):
        super().__init__(
            f"stopped by {number.name} after step {step}, all saved; go on with: mea train --resume {run.quoted}"
        )
        self.signal, self.main = number, main
