"""Writing so that a kill, a full disk or a power cut leaves the old file or the new one, never half of either."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

WRITE_ERRORS = (OSError, SafetensorError)
"""What a failed write raises; safetensors wraps the system's error in one of its own."""


class RunError(RuntimeError):
    """Something outside the user's options stopped a run; the message says what was kept and how to go on."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file under a temporary name, flush it to the disk and rename it into place."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextlib.contextmanager
def directory_written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` if the block ends well and is removed if not."""
    temporary = path.with_name(f".{path.name}.partial")
    discard(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        discard(path)
        temporary.rename(path)
        flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(path: Path) -> None:
    """Remove a directory if it is there; one whose removal was cut short never looks whole."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.discarded")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def flush(path: Path) -> None:
    """Ask the system to put a file's content, or a directory's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
