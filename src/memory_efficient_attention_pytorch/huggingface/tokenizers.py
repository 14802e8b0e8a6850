"""Tokenizers as transformers loads them: from a file of the tokenizers library, and of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast


def tokenizer_of_file(path: Path, end_id: int | None) -> Any:
    """Load a tokenizer.json of the tokenizers library. end_id: the token that ends a document and pads."""
    return _fast({"tokenizer_file": str(path)}, end_id)


def byte_tokenizer(end_id: int | None = 0) -> Any:
    """Make a tokenizer in which each byte of UTF-8 is the token of its value. end_id: ends a document and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The byte-level pre-tokenizer writes printable bytes as themselves, the others as characters from 256 on, in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = Tokenizer(models.BPE(vocab={character: byte for byte, character in characters.items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _fast({"tokenizer_object": backend}, end_id)


def _fast(source: dict[str, Any], end_id: int | None) -> Any:
    tokenizer = PreTrainedTokenizerFast(**source, clean_up_tokenization_spaces=False)
    if end_id is not None:
        end = tokenizer.convert_ids_to_tokens(end_id)
        tokenizer.eos_token = tokenizer.pad_token = end
    return tokenizer
