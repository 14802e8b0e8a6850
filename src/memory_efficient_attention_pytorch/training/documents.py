"""Find and read the text: files, directories, .gz files, the Python standard library."""

import contextlib
import gzip
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from .files import is_run_directory, quoted

CHUNK = 1 << 20
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document:
    """One file, read in chunks. size: its bytes on disk. bytes_read: bytes of text read so far, unpacked.

    Raises ValueError if there is no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.bytes_read = 0
        with _told(path):
            self.size = path.stat().st_size

    def chunks(self) -> Iterator[bytes]:
        """Yield the text in chunks, .gz files unpacked. Raises ValueError if it cannot be read or is not whole."""
        self.bytes_read = 0
        unpacked = gzip.open if self.path.suffix.lower() == ".gz" else open
        with _told(self.path), unpacked(self.path, "rb") as file:
            while chunk := file.read(CHUNK):
                self.bytes_read += len(chunk)
                yield chunk


@contextlib.contextmanager
def naming(document: Document) -> Iterator[None]:
    """Turn the decoder's error into a ValueError that names the document."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {document.path} is not UTF-8 at byte {error.start}: convert it, or train on bytes, "
            "without a tokenizer"
        ) from error


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read into a ValueError."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data: {path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"data: cannot read {path}: {error.strerror}") from error


def find_documents(data: Iterable[str | Path]) -> list[Document]:
    """Return the documents that paths name: files, and every file beneath directories that is not hidden.

    Links are followed; beneath one path each directory and file is visited once. Run directories are left out: what
    `mea train` wrote is no text to learn. Without paths, the Python standard library's sources are taken: real text
    that every installation has.

    Raises ValueError for a missing path, a directory without files, a run directory named as text, and anything that
    cannot be read, broken links included.
    """
    paths = [Path(path) for path in data]
    files = [file for path in paths for file in _named(path)] if paths else standard_library()
    return [Document(file) for file in files]


def _named(path: Path) -> list[Path]:
    if not os.path.lexists(path):
        raise ValueError(f"data: there is no file or directory {path}")
    with _told(path):
        if not stat.S_ISDIR(path.stat().st_mode):
            return [path]
    if is_run_directory(path):
        resume = f"mea train --resume {quoted(path)}"
        raise ValueError(f"data: {path} is a run of mea train, not text: {resume} goes on with it")
    files = list(_beneath(path, Path(os.path.realpath(path)), set()))
    if not files:
        raise ValueError(f"data: the directory {path} has no files besides hidden ones and runs of mea train")
    return files


def _beneath(folder: Path, place: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the files under a folder. place: its real path; seen: real paths visited already."""
    seen.add(place)
    with _told(folder):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        real = Path(os.path.realpath(path)) if entry.is_symlink() else place / entry.name
        if real in seen:
            continue
        with _told(path):
            mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            seen.add(real)
            yield path
        elif not stat.S_ISDIR(mode):
            raise ValueError(f"data: {path} is neither a file nor a directory: name what is to be read")
        elif not is_run_directory(path):
            yield from _beneath(path, real, seen)


def standard_library() -> list[Path]:
    """Return the running interpreter's .py files, without installed packages and tests.

    Not every distribution ships the tests, and some of them are deliberately not valid text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in sorted(root.rglob("*.py")) if not _NOT_SOURCES & set(path.relative_to(root).parts)]
    if not found:
        raise ValueError(f"data: the Python standard library has no sources in {root}: name text with --data")
    return found
