"""Tokenise text once into memory-mapped files, and cut it into batches that depend only on seed and step."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from .config import TrainConfig
from .documents import Document, naming
from .files import directory_written_atomically
from .tokenizers import Tokenizer

Numbers = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class CorpusInfo:
    """The contents of `data/corpus.json`, which describes the tokenised text.

    dtype: of the tokens on disk. train_tokens, validation_tokens: their numbers. bytes_per_token: measured over all the
    text, to turn nats per token into bits per byte. documents: their number. split: what was held out for validation,
    in words.
    """

    dtype: str
    train_tokens: int
    validation_tokens: int
    bytes_per_token: float
    documents: int
    split: str


class Corpus:
    """The tokenised text of a run, memory-mapped, so it may be larger than memory.

    Raises ValueError if a file is missing or has another length than was written.
    """

    def __init__(self, directory: Path):
        try:
            self.info = CorpusInfo(**json.loads((directory / "corpus.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"the tokenised text in {directory} is damaged ({error}): start a new run") from error
        self.train = self._map(directory / "train.bin", self.info.train_tokens)
        self.validation = self._map(directory / "validation.bin", self.info.validation_tokens)

    def _map(self, path: Path, count: int) -> np.ndarray:
        expected = count * np.dtype(self.info.dtype).itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise ValueError(f"{path} is damaged: {size} bytes instead of {expected}; start a new run")
        if not count:
            return np.empty(0, dtype=self.info.dtype)  # an empty file cannot be mapped
        return np.memmap(path, dtype=self.info.dtype, mode="r")


def tokenise(
    documents: list[Document],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    validation_fraction: float,
    seed: int,
    report: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the documents' tokens to `directory`, the validation part to a file of its own.

    Whole documents are held out, drawn by `seed`, as long as they fit in `validation_fraction` of the text. Where they
    cannot make up half of that (a single file, say), the end of every document is held out instead. The text is
    streamed, so memory does not grow with it. `report` is called with the bytes read so far.

    Raises ValueError naming the document that is not UTF-8 (with a tokenizer), unreadable or damaged, and if there is
    too little text.
    """
    held_out = _draw_validation(documents, validation_fraction, seed)
    dtype = np.uint8 if tokenizer.num_tokens <= 256 else np.uint16 if tokenizer.num_tokens <= 65536 else np.uint32
    end = np.array([] if tokenizer.end_id is None else [tokenizer.end_id], dtype=dtype)
    total_bytes = total_tokens = 0
    with directory_written_atomically(directory) as partial:
        with (partial / "train.bin").open("w+b") as train, (partial / "validation.bin").open("wb") as validation:
            for index, document in enumerate(documents):
                into = validation if index in held_out else train
                start = into.tell()
                for tokens in _tokens_of(document, tokenizer):
                    into.write(tokens.astype(dtype, copy=False).tobytes())
                    report(total_bytes + document.bytes_read)
                total_bytes += document.bytes_read
                if document.bytes_read:
                    into.write(end.tobytes())
                count = (into.tell() - start) // end.itemsize
                total_tokens += count
                if not held_out:
                    _move_tail(train, validation, round(count * validation_fraction) * end.itemsize)
            sizes = [file.tell() // end.itemsize for file in (train, validation)]
        if not total_tokens:
            raise ValueError("data: the text is empty, there is nothing to learn from")
        info = CorpusInfo(
            dtype=np.dtype(dtype).name,
            train_tokens=sizes[0],
            validation_tokens=sizes[1],
            bytes_per_token=total_bytes / total_tokens,
            documents=len(documents),
            split=_describe(len(documents), len(held_out)),
        )
        (partial / "corpus.json").write_text(json.dumps(dataclasses.asdict(info), indent=1) + "\n")


def _draw_validation(documents: list[Document], fraction: float, seed: int) -> set[int]:
    """Return the indices of the documents to hold out whole; none if they cannot make up half the fraction."""
    room = fraction * sum(document.size for document in documents)
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    chosen, used = set(), 0
    for index in order:
        if 0 < documents[index].size <= room - used:
            chosen.add(index)
            used += documents[index].size
    return chosen if used >= room / 2 else set()


def _describe(documents: int, held_out: int) -> str:
    if held_out:
        return f"{held_out} of {documents} documents"
    return "the end of the document" if documents == 1 else f"the end of each of {documents} documents"


def _tokens_of(document: Document, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    with naming(document):
        yield from tokenizer.encode_stream(document.chunks())


def _move_tail(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Move the last `size` bytes of `source` to the end of `target`."""
    start = source.seek(-size, 1)
    shutil.copyfileobj(source, target)
    source.seek(start)
    source.truncate()


def check_length(corpus: Corpus, seq_len: int) -> None:
    """Raise ValueError if the text does not fill one window, or leaves nothing to validate on."""
    tokens = len(corpus.train)
    if tokens < seq_len + 1:
        raise ValueError(
            f"data: the text is too short, {tokens} tokens for training where one window takes {seq_len + 1}: "
            f"give more text or a smaller --seq-len"
        )
    if len(corpus.validation) < 2:
        raise ValueError(
            f"data: the text is too short, {len(corpus.validation)} tokens for validation: "
            "give more text or a larger --validation-fraction"
        )


class Batches:
    """Yields training windows, each once per pass over the text, in an order that depends only on the seed.

    Step s takes windows s·w … s·w + w − 1 of that order, w = accumulation · processes · batch_size, laid out as
    (accumulation, processes, batch_size): the global batch is the same however it is divided. There is no state between
    calls, so the step's number is the position in the data.
    """

    def __init__(self, tokens: np.ndarray, config: TrainConfig, processes: int = 1, process: int = 0):
        self.tokens, self.seq_len, self.seed = tokens, config.seq_len, config.seed
        self.layout = (config.accumulation, processes, config.batch_size)
        self.process = process
        # One window fewer than fits leaves room for a different offset in each pass.
        self.count = max(1, (len(tokens) - 1) // self.seq_len - 1)

    @property
    def windows_per_step(self) -> int:
        return int(np.prod(self.layout))

    def __call__(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of an optimizer step for this process: x and labels, each (batch_size, seq_len) int64."""
        first = step * self.windows_per_step
        starts = self.starts(np.arange(first, first + self.windows_per_step)).reshape(self.layout)
        for batch in starts[:, self.process]:
            yield shifted(self.tokens, batch, self.seq_len)

    def starts(self, index: np.ndarray) -> np.ndarray:
        """Return the offsets in the text at which windows `index`, counted over the whole run, begin."""
        passes, positions = index // self.count, index % self.count
        starts = np.empty_like(index)
        for number in np.unique(passes):
            here = passes == number
            rng = np.random.default_rng([self.seed, int(number)])
            offset = rng.integers(0, len(self.tokens) - self.count * self.seq_len)
            keys = rng.integers(0, 1 << 63, size=4, dtype=np.uint64)
            starts[here] = offset + permute(positions[here], self.count, keys).astype(np.int64) * self.seq_len
        return starts


def shifted(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows and, as labels, the same shifted by one token: two (len(starts), length) int64."""
    windows = torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def evaluation_starts(tokens: np.ndarray, config: TrainConfig) -> tuple[np.ndarray, int]:
    """Return the fixed validation set: the starts of its windows, evenly spread over the text, and their length."""
    length = min(config.seq_len, len(tokens) - 1)
    room = len(tokens) - 1 - length
    count = min(config.evaluation_windows, room // length + 1)
    return np.linspace(0, room, count).astype(np.int64), length


def permute(index: np.ndarray, size: int, keys: Numbers) -> Numbers:
    """Evaluate a permutation of 0 … size − 1, chosen by `keys`, at `index`, without a table of `size` entries.

    A Feistel network over the least even number of bits that holds `size`; values outside the range pass through it
    again until they are inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & low
        for key in keys:
            left, right = right, left ^ (_scramble(right + key) & low)
        value[outside] = (left << half) | right
        outside = value >= size
    return value


def _scramble(value: Numbers) -> Numbers:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood, 2014); uint64 arithmetic wraps around."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
