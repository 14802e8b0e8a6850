"""Tokenizers as transformers loads them: one that is a file of the tokenizers library, and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast


def tokenizer_of_file(path: Path, end_id: int | None) -> Any:
    """A tokenizer.json of the tokenizers library; end_id: the token that ends a document, and that pads."""
    return _fast({"tokenizer_file": str(path)}, end_id)


def byte_tokenizer(end_id: int | None = 0) -> Any:
    """Each byte of UTF-8 is the token of its number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The characters by which the byte-level pre-tokenizer stands for bytes: printable ones for themselves, and those
    # from 256 on for the others, in order.
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
