"""Text to token numbers and back: bytes as they are, or a Hugging Face tokenizers file."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

END_OF_DOCUMENT = "<|endoftext|>"
# Names under which published tokenizers keep the token that ends a document.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
# Characters after which a text without line ends is cut anywhere.
_LONGEST_LINE = 1 << 20
# Lines given to the tokenizer at once; it works on such batches in parallel.
_BATCH_LINES = 256


class Tokenizer(Protocol):
    """What training and generation ask of a tokenizer.

    num_tokens: size of the vocabulary. end_id: the token that ends a document, None if the vocabulary has none.
    """

    num_tokens: int
    end_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def encode_stream(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Token numbers of one document that comes in chunks of bytes cut anywhere."""
        ...


class ByteTokenizer:
    """One token per byte, 256 in all; byte 0, which no text contains, ends a document."""

    num_tokens = 256
    end_id: int | None = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8, such as half of a character, become U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def encode_stream(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            yield np.frombuffer(chunk, dtype=np.uint8)


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library.

    Raises ValueError if the file is missing or is not one of that library's.
    """

    def __init__(self, path: Path | str):
        from tokenizers import Tokenizer as Backend

        if not Path(path).is_file():
            raise ValueError(f"tokenizer {path} is not a file: give a tokenizer.json of the tokenizers library")
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer {path} is not a file of the tokenizers library: {error}") from error
        # Not the size of the vocabulary: its numbers may have gaps.
        self.num_tokens = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.num_tokens:
            raise ValueError(f"tokenizer {path} has no tokens")
        ids = (self.backend.token_to_id(name) for name in _END_NAMES)
        self.end_id = next((number for number in ids if number is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self.backend.decode(list(tokens), skip_special_tokens=False)

    def encode_stream(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        for text in decode_lines(chunks):
            lines = text.splitlines(keepends=True)
            batches = ["".join(lines[i : i + _BATCH_LINES]) for i in range(0, len(lines), _BATCH_LINES)]
            for encoding in self.backend.encode_batch_fast(batches, add_special_tokens=False):
                yield np.asarray(encoding.ids, dtype=np.uint32)


def decode_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Text in pieces that end at line ends where there are any, from bytes cut anywhere.

    Raises UnicodeDecodeError if it is not UTF-8; the error's `start` counts from the beginning of the document.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, passed = "", 0
    for chunk in itertools.chain(chunks, [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            rest += decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            start = passed - waiting + error.start
            raise UnicodeDecodeError("utf-8", b"", start, start + 1, error.reason) from None
        passed += len(chunk)
        cut = len(rest) if len(rest) > _LONGEST_LINE or not chunk else rest.rfind("\n") + 1
        if cut:
            yield rest[:cut]
            rest = rest[cut:]


def train_tokenizer(texts: Iterator[str], vocab_size: int, path: Path) -> SubwordTokenizer:
    """Train a byte-level BPE on `texts`, write it to `path` and return it. It may end with fewer tokens than asked."""
    from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], show_progress=False)
    backend.save(str(path))
    return SubwordTokenizer(path)
