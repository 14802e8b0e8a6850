"""Write files so that a kill, a full disk or a power cut leaves the old file or the new one, never half of either."""

import contextlib
import errno
import hashlib
import io
import os
import shlex
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

WRITE_ERRORS = (OSError, SafetensorError)
"""Exceptions of a failed write; safetensors wraps the system's error in one of its own."""


class RunError(RuntimeError):
    """Raised when something other than the user's options stops a run; says what was kept and how to resume."""


class ElsewhereError(RunError):
    """Raised when another process of the run has failed. mistake: whether the options or the text were wrong."""

    def __init__(self, *, mistake: bool):
        super().__init__("another process of the run has failed and says why")
        self.mistake = mistake


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it into place."""
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


def write_figure(path: Path, figure: Any) -> Path:
    """Write a figure of matplotlib's as PNG, making its folder, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(figure))
    return path


def png(figure: Any) -> bytes:
    """Return a figure of matplotlib's as PNG."""
    found = io.BytesIO()
    figure.savefig(found, dpi=130, format="png", metadata={"Software": None})
    return found.getvalue()


@contextlib.contextmanager
def directory_written_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` if the block succeeds and is removed if not."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        raise FileExistsError(errno.EEXIST, "something else has the name, which is to be moved away", str(path))
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
    """Remove a directory, if there is one; renamed first, so that a removal cut short leaves nothing whole."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f".{path.name}.discarded")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def flush(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return a file's checksum, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_run_directory(path: Path) -> bool:
    """Return whether `mea train` wrote to this directory: it has a configuration and another of a run's files."""
    try:
        with (path / "config.toml").open("rb") as file:
            # After what an editor may have put before it: a byte order mark, comments.
            lines = (line for line in file.read(2**16).removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip())
            written_here = next((line for line in lines if line[:1] != b"#"), b"").startswith(b"format = ")
    except OSError:
        return False
    return written_here and any(os.path.exists(path / name) for name in _OF_A_RUN)


# A configuration alone may be a copy, to start another run from.
_OF_A_RUN = (".lock", "metrics.jsonl", "data/corpus.json", ".data.partial")


def quoted(path: Path | str) -> str:
    """Return a path quoted for a shell, for commands that the user may copy."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    # For example with a newline, or a byte that is not UTF-8.
    return "$'" + "".join(chr(b) if chr(b) in _PLAIN else f"\\x{b:02x}" for b in os.fsencode(text)) + "'"


_PLAIN = string.ascii_letters + string.digits + "/._-+,:@%"
