"""Text to token numbers and back: bytes as they are, or a Hugging Face tokenizers file."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..common.errors import brought_by
from .files import write_atomically

END_OF_DOCUMENT = "<|endoftext|>"
# Names under which published tokenizers keep the token that ends a document.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
# Characters after which a text without line ends is cut anywhere.
_LONGEST_LINE = 1 << 20
# Characters of a window of the text, and those that it has in common with the next: windows are encoded in parallel.
_WINDOW, _COMMON = 1 << 14, 1 << 10
# So many tokens in a row that two windows both find are where one may follow on the other.
_ALIKE = 8


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
        with brought_by("train"):
            from tokenizers import Tokenizer as Backend

        if not Path(path).is_file():
            raise ValueError(f"tokenizer {path} is not a file: give a tokenizer.json of the tokenizers library")
        try:
            self.backend = Backend.from_buffer(Path(path).read_bytes())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer {path} is not a file of the tokenizers library: {error}") from error
        # A file may ask for texts of one length, as its own model takes them.
        self.backend.no_truncation()
        self.backend.no_padding()
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
        """The tokens that the whole text has, of which windows are held at a time.

        A tokenizer may put a space before what it is given, strip it, or join what a cut would part. So windows
        overlap, and one follows on the other amid a row of tokens that both have found. Where there is no such row
        (in a thousand equal letters, say), it follows at a token's end.
        """
        here, first = None, 0  # a window, and its first token that is still to come
        for following in self._windows(chunks):
            last = start = 0
            if here is not None:
                meeting = here.meeting(following)
                if meeting is None:
                    last, end = here.cut(following.begin)
                    following = self._encoded([following.text[end - following.begin :]], end)[0]
                else:
                    last, start = meeting
                yield here.ids[first:last]
            here, first = following, start
        if here is not None:
            yield here.ids[first:]

    def _windows(self, chunks: Iterable[bytes]) -> "Iterator[_Window]":
        text, begin = "", 0
        for piece in decode_lines(chunks):
            text += piece
            whole = max(0, len(text) - _COMMON) // _WINDOW
            yield from self._encoded([text[i * _WINDOW :][: _WINDOW + _COMMON] for i in range(whole)], begin)
            text, begin = text[whole * _WINDOW :], begin + whole * _WINDOW
        if len(text) > _COMMON or (text and not begin):
            yield from self._encoded([text], begin)

    def _encoded(self, texts: list[str], begin: int) -> "list[_Window]":
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"the tokenizer cannot read the text: {error}") from error
        return [_Window(text, begin + i * _WINDOW, encodings[i]) for i, text in enumerate(texts)]


class _Window:
    """A part of a text: where it begins, its tokens, and the places in the text where each begins and ends."""

    def __init__(self, text: str, begin: int, encoding: Any):
        self.text, self.begin, self.end = text, begin, begin + len(text)
        self.ids = np.asarray(encoding.ids, dtype=np.uint32)
        self.spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + begin

    def meeting(self, following: "_Window") -> tuple[int, int] | None:
        """The middle of the longest row of tokens that both have found, as an index in each; None if that is short."""
        offset = self._index(following.begin)
        mine = {token: i for i, token in enumerate(self._tokens(offset, None), offset)}
        theirs = following._tokens(0, following._index(self.end))
        before, row, longest, middle = -2, 0, 0, (0, 0)
        for j, token in enumerate(theirs):
            i = mine.get(token, -2)
            row = 0 if i < 0 else row + 1 if i == before + 1 else 1
            before = i
            if row > longest:
                longest, middle = row, (i - row // 2, j - row // 2)
        return middle if longest >= _ALIKE else None

    def cut(self, place: int) -> tuple[int, int]:
        """The number of tokens up to the end of the first that ends at a place or later, and where that is."""
        index = int(np.searchsorted(self.spans[:, 1], place))
        return (index + 1, int(self.spans[index, 1])) if index < len(self.spans) else (index, self.end)

    def _index(self, place: int) -> int:
        return int(np.searchsorted(self.spans[:, 0], place))

    def _tokens(self, first: int, last: int | None) -> list[tuple[int, int, int]]:
        return list(zip(self.ids[first:last].tolist(), *self.spans[first:last].T.tolist(), strict=True))


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
    with brought_by("train"):
        from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], show_progress=False)
    write_atomically(path, backend.to_str(pretty=True))
    return SubwordTokenizer(path)
