"""Turn text into tokens and back: by bytes, or by a Hugging Face tokenizers file."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..common.errors import brought_by
from .files import write_atomically

END_OF_DOCUMENT = "<|endoftext|>"
# Names that published tokenizers give the token that ends a document.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
# A text without line ends is cut anywhere after this many characters.
_LONGEST_LINE = 1 << 20
# Characters in a window of the text, and in its overlap with the next one; windows are encoded in parallel.
_WINDOW, _COMMON = 1 << 14, 1 << 10
# Windows are joined where both have at least this many tokens in a row in common.
_ALIKE = 8


class Tokenizer(Protocol):
    """The interface of tokenizers for training and generation.

    num_tokens: size of the vocabulary. end_id: the token that ends a document, None if the vocabulary has none.
    """

    num_tokens: int
    end_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def encode_stream(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yield the tokens of one document, given in chunks of bytes cut anywhere."""
        ...


class ByteTokenizer:
    """Makes one token per byte, 256 in all; byte 0, which text does not contain, ends a document."""

    num_tokens = 256
    end_id: int | None = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text; bytes that are not UTF-8, such as half of a character, become U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def encode_stream(self, chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            yield np.frombuffer(chunk, dtype=np.uint8)


class SubwordTokenizer:
    """Wraps a tokenizer of the `tokenizers` library.

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
        # A file may set truncation or padding to its own model's length.
        self.backend.no_truncation()
        self.backend.no_padding()
        # Not the vocabulary's size: its ids may have gaps.
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
        """Yield the tokens of the whole text while holding only windows of it.

        A tokenizer may prepend a space to its input, strip it, or merge across a cut. So windows overlap and are joined
        in the middle of a run of tokens that both share. Where there is no such run (in a thousand equal letters, say),
        they are joined at a token's end.
        """
        here, first = None, 0  # a window, and its first token that was not yielded yet
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
    """A part of a text: where it begins, its tokens, and where in the text each token begins and ends."""

    def __init__(self, text: str, begin: int, encoding: Any):
        self.text, self.begin, self.end = text, begin, begin + len(text)
        self.ids = np.asarray(encoding.ids, dtype=np.uint32)
        self.spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) + begin

    def meeting(self, following: "_Window") -> tuple[int, int] | None:
        """Return the middle of the longest run of shared tokens, as an index in each; None if the run is too short."""
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
        """Return the number of tokens up to and including the first that ends at `place` or later, and its end."""
        index = int(np.searchsorted(self.spans[:, 1], place))
        return (index + 1, int(self.spans[index, 1])) if index < len(self.spans) else (index, self.end)

    def _index(self, place: int) -> int:
        return int(np.searchsorted(self.spans[:, 0], place))

    def _tokens(self, first: int, last: int | None) -> list[tuple[int, int, int]]:
        return list(zip(self.ids[first:last].tolist(), *self.spans[first:last].T.tolist(), strict=True))


def decode_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Decode bytes cut anywhere into pieces of text that end at line ends, if there are any.

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
    """Train a byte-level BPE on `texts`, write it to `path` and return it. It may have fewer tokens than asked for."""
    with brought_by("train"):
        from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], show_progress=False)
    write_atomically(path, backend.to_str(pretty=True))
    return SubwordTokenizer(path)
