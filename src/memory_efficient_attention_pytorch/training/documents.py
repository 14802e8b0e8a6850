"""Where the text comes from: files, directories, .gz files, the Python standard library."""

import contextlib
import gzip
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

CHUNK = 1 << 20
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document:
    """One file, read in chunks. size: its bytes on the disk. bytes_read: bytes of text that have come out of it.

    Raises ValueError if there is no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.bytes_read = 0
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise ValueError(f"data: cannot read {path}: {error.strerror}") from error

    def chunks(self) -> Iterator[bytes]:
        """The text in pieces, .gz files unpacked. Raises ValueError if it cannot be read or is no whole .gz file."""
        self.bytes_read = 0
        try:
            with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    self.bytes_read += len(chunk)
                    yield chunk
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"data: {self.path} is not a whole gzip file: {error}") from error
        except OSError as error:
            raise ValueError(f"data: cannot read {self.path}: {error.strerror}") from error


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


def find_documents(data: Iterable[str | Path]) -> list[Document]:
    """The documents that paths name: files as they are, of directories every file beneath that is not hidden.

    With no path, the Python standard library's sources: real text that every installation has.
    Raises ValueError for a path that is missing and a directory without files.
    """
    paths = [Path(path) for path in data]
    files = [file for path in paths for file in _beneath(path)] if paths else standard_library()
    return [Document(file) for file in files]


def _beneath(path: Path) -> list[Path]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        if not files:
            raise ValueError(f"data: the directory {path} has no files")
        return files
    if not path.exists():
        raise ValueError(f"data: there is no file or directory {path}")
    return [path]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def standard_library() -> list[Path]:
    """The running interpreter's .py files, without installed packages and without the tests.

    Distributions differ in whether they ship the tests, some of which are written to be no valid text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in sorted(root.rglob("*.py")) if not _NOT_SOURCES & set(path.relative_to(root).parts)]
    if not found:
        raise ValueError(f"data: the Python standard library has no sources in {root}: name text with --data")
    return found
