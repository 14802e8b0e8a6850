"""Turn the text that the configuration names into tokens in the run directory."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from .config import TrainConfig
from .data import tokenise
from .documents import Document, find_documents, naming
from .files import write_atomically
from .run_directory import RunDirectory
from .tokenizers import ByteTokenizer, SubwordTokenizer, Tokenizer, decode_lines, train_tokenizer
from .tracking import Callback


def prepare_text(run: RunDirectory, config: TrainConfig, callback: Callback) -> None:
    """Tokenise the run's text into `run.data`, unless that was done before; see `data.tokenise`.

    Standard input is first copied to the run directory: it can be read only once, but training a tokenizer and resuming
    after a kill each need another reading. The copy is removed when the tokens are written.
    Raises ValueError for text that cannot be used.
    """
    if run.data.is_dir():
        return
    documents = find_documents(
        _keep_standard_input(run.standard_input) if name == "-" else name for name in config.data
    )
    total = sum(document.size for document in documents)

    def report(done: int) -> None:
        callback.reading(done, total)

    tokenizer = _make_tokenizer(run, config, documents, report)
    tokenise(
        documents,
        tokenizer,
        run.data,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        report=report,
    )
    run.standard_input.unlink(missing_ok=True)


def _keep_standard_input(path: Path) -> Path:
    if path.exists():
        return path
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("data: standard input is the terminal: pipe text into mea train --data -")
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    if not partial.stat().st_size:
        raise ValueError("data: standard input is empty")
    return partial.rename(path)


def _make_tokenizer(
    run: RunDirectory, config: TrainConfig, documents: list[Document], report: Callable[[int], None]
) -> Tokenizer:
    if config.tokenizer is not None:
        tokenizer = SubwordTokenizer(config.tokenizer)
        write_atomically(run.tokenizer, Path(config.tokenizer).read_bytes())
        return tokenizer
    if config.vocab_size is not None:
        for document in documents:
            if not document.path.is_file():
                raise ValueError(
                    f"data: {document.path} can be read only once, and training a tokenizer needs two readings: "
                    "pipe it into mea train --data -"
                )
        return train_tokenizer(_texts(documents, report), config.vocab_size, run.tokenizer)
    return ByteTokenizer()


def _texts(documents: list[Document], report: Callable[[int], None]) -> Iterator[str]:
    before = 0
    for document in documents:
        with naming(document):
            for text in decode_lines(document.chunks()):
                report(before + document.bytes_read)
                yield text
        before += document.bytes_read
