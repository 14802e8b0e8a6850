"""Documents, tokenizers and what they become on disk."""

import argparse
import functools
import gzip
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from memory_efficient_attention_pytorch.training.config import TrainConfig, dump_config
from memory_efficient_attention_pytorch.training.data import Corpus, check_length, tokenise
from memory_efficient_attention_pytorch.training.documents import find_documents, standard_library
from memory_efficient_attention_pytorch.training.tokenizers import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    SubwordTokenizer,
    decode_lines,
    train_tokenizer,
)


def tokenised(tmp_path, paths, tokenizer=None, validation_fraction=0.1, seed=0):
    directory = tmp_path / "data"
    documents = find_documents(paths)
    tokenise(documents, tokenizer or ByteTokenizer(), directory, validation_fraction=validation_fraction, seed=seed)
    return Corpus(directory)


def text_of(tokens):
    return ByteTokenizer().decode(tokens.tolist())


def test_a_file_keeps_every_byte_and_its_end_is_held_out(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    corpus = tokenised(tmp_path, [tmp_path / "a.txt"])
    assert text_of(corpus.train) + text_of(corpus.validation) == text + "\0"
    assert len(corpus.validation) == round(0.1 * (len(text) + 1))
    assert corpus.train.dtype == np.uint8
    assert corpus.info.split == "the end of the document"


def test_whole_documents_are_held_out_where_there_are_enough(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"document {i} " + "x" * (50 + i) for i in range(40)]
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(text)
    corpus = tokenised(tmp_path, [folder])
    train, validation = (text_of(part).split("\0")[:-1] for part in (corpus.train, corpus.validation))
    assert sorted(train + validation) == sorted(texts)
    assert 0.05 * sum(map(len, texts)) <= sum(map(len, validation)) <= 0.1 * sum(map(len, texts))
    assert corpus.info.split == f"{len(validation)} of 40 documents"


def test_the_seed_draws_the_documents(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i:02} " * 9)
    seen = {}
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / run).mkdir()
        seen[run] = text_of(tokenised(tmp_path / run, [folder], seed=seed).validation)
    assert seen["a"] == seen["b"] != seen["c"]


def test_few_documents_each_give_their_end(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 99)
    corpus = tokenised(tmp_path, [tmp_path / f"{name}.txt" for name in "abc"])
    assert text_of(corpus.validation) == "".join(name * 9 + "\0" for name in "abc")
    assert corpus.info.split == "the end of each of 3 documents"


@pytest.mark.parametrize("name", ["a.txt.gz", "A.TXT.GZ"])
def test_gz_is_unpacked(tmp_path, name):
    text = "packed text\n" * 5000
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    corpus = tokenised(tmp_path, [tmp_path / name])
    assert text_of(corpus.train) + text_of(corpus.validation) == text + "\0"


def test_directories_leave_out_hidden_files(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("b.txt", "sub/a.txt", ".secret", ".git/config"):
        (folder / name).write_text("text")
    assert [document.path.name for document in find_documents([folder])] == ["b.txt", "a.txt"]


def names_of(*paths):
    return [document.path.name for document in find_documents(paths)]


def test_links_are_followed_once(tmp_path):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for path in (folder / "a.txt", folder / "sub/b.txt", elsewhere / "deep/c.txt", tmp_path / "d.txt"):
        path.write_text("text")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked-again").symlink_to(elsewhere / "deep")
    (folder / "d.txt").symlink_to("../d.txt")
    (folder / "also-a.txt").symlink_to("a.txt")
    (folder / "sub/up").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder / "sub")
    assert sorted(names_of(folder)) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    (tmp_path / "other").symlink_to(folder)
    assert sorted(names_of(tmp_path / "other")) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert names_of(folder / "a.txt", folder / "a.txt") == ["a.txt", "a.txt"]  # as asked


@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, target):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "itself").symlink_to(target)
    with pytest.raises(ValueError, match=r"data: cannot read .*itself: (No such file|Too many levels)"):
        find_documents([tmp_path])
    with pytest.raises(ValueError, match=r"data: cannot read .*itself: (No such file|Too many levels)"):
        find_documents([tmp_path / "itself"])


def test_a_directory_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "private").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"data: cannot read .*private: Permission denied"):
        find_documents([tmp_path])


def test_what_is_neither_a_file_nor_a_directory_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"data: .*pipe is neither a file nor a directory"):
        find_documents([tmp_path])


@pytest.mark.parametrize("left", ["data/corpus.json", "metrics.jsonl", ".lock", ".data.partial"])
def test_a_run_is_no_text(tmp_path, left):
    run = tmp_path / "experiments" / "seven"
    (run / "data").mkdir(parents=True)
    (run / left).touch()
    (run / "standard-input.txt").write_text("a copy")
    edited = "\ufeff# what I changed\n\n" if left == "metrics.jsonl" else ""
    (run / "config.toml").write_text(edited + dump_config(TrainConfig()))
    (tmp_path / "a.txt").write_text("text")
    # A configuration that was copied out of a run is no run, and that of something else neither.
    (tmp_path / "config.toml").write_text(dump_config(TrainConfig()))
    (tmp_path / "experiments/config.toml").write_text('title = "mine"')
    (tmp_path / "experiments/metrics.jsonl").write_text("{}")
    assert names_of(tmp_path) == ["a.txt", "config.toml", "config.toml", "metrics.jsonl"]
    with pytest.raises(ValueError, match=r"seven is a run of mea train, not text: mea train --resume .*seven goes on"):
        find_documents([run])


def test_the_standard_library_is_real_text_without_tests_and_packages():
    paths = standard_library()
    assert len(paths) > 300
    assert {"argparse.py", "heapq.py"} <= {path.name for path in paths}
    assert not any({"test", "tests", "site-packages"} & set(path.parts[-4:]) for path in paths)


def test_subwords_are_trained_and_restore_the_text(tmp_path):
    lines = [f"the quick brown fox number {i} jumps over the lazy dog\n" for i in range(2000)]
    text = "".join(lines) + "ümläut 🙂\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer(iter([text]), 400, tmp_path / "tokenizer.json")
    corpus = tokenised(tmp_path, [tmp_path / "a.txt"], tokenizer)
    both = np.concatenate([corpus.train, corpus.validation]).tolist()
    assert tokenizer.decode(both) == text + END_OF_DOCUMENT
    assert corpus.train.dtype == np.uint16
    assert 257 < tokenizer.num_tokens <= 400
    assert corpus.info.bytes_per_token == len(text.encode()) / len(both) > 2
    assert SubwordTokenizer(tmp_path / "tokenizer.json").encode("the fox") == tokenizer.encode("the fox")


def space_before(model):
    """As SentencePiece does it: spaces become ▁, and one is put before the text."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def byte_level(**options):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def lowered_words():
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return backend


def metaspace():
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return backend


KINDS = {
    "SentencePiece, BPE": lambda: (space_before(models.BPE(unk_token="<unk>")), trainers.BpeTrainer),
    "SentencePiece, Unigram": lambda: (metaspace(), functools.partial(trainers.UnigramTrainer, unk_token="<unk>")),
    "bytes": lambda: (byte_level(add_prefix_space=False), trainers.BpeTrainer),
    "bytes with a space before": lambda: (byte_level(add_prefix_space=True), trainers.BpeTrainer),
    "words": lambda: (lowered_words(), trainers.WordPieceTrainer),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_streams_tokens_are_those_of_the_whole_text(tmp_path, kind):
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    backend, trainer = KINDS[kind]()
    lines = source.splitlines(keepends=True)[:700]
    special = ["<unk>"] if kind.startswith("S") or kind == "words" else []
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if kind.startswith("bytes") else {}
    made_by = trainer(vocab_size=500, special_tokens=special, show_progress=False, **options)
    backend.train_from_iterator([*lines, "a b " * 9, " " * 99, "x" * 9], made_by)
    backend.enable_truncation(64)  # as files published with a model of that length may have it
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = SubwordTokenizer(tmp_path / "tokenizer.json")
    odd = "läuft 🙂 漢字\n\n\n  \n" * 1500
    endless = "a b " * 5000 + "\n" * 20_000 + " " * 20_000 + "x" * 20_000
    parts = [source[:length] for length in (0, 2, (1 << 14) + 1023, (1 << 14) + 1024, (1 << 14) + 1025)]
    for text in (source + odd, "\n", *parts, *([endless] if kind.startswith("bytes") else [])):
        chunks = (text.encode()[i : i + 70_001] for i in range(0, len(text.encode()), 70_001))
        stream = np.concatenate([np.empty(0, np.uint32), *tokenizer.encode_stream(chunks)])
        assert stream.tolist() == tokenizer.encode(text)


def test_a_tokenizer_that_cannot_read_the_text_says_so(tmp_path):
    backend = tokenizers.Tokenizer(models.Unigram([("a", -1.0)], None, False))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"the tokenizer cannot read the text: .*unknown token"):
        list(SubwordTokenizer(tmp_path / "tokenizer.json").encode_stream([b"xyz"]))


def test_a_text_without_any_token_is_empty(tmp_path):
    backend = lowered_words()
    backend.model = models.WordPiece({"<unk>": 0, "a": 1}, unk_token="<unk>")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spaces.txt").write_text(" \n" * 50)
    with pytest.raises(ValueError, match="the text is empty"):
        tokenised(tmp_path, [tmp_path / "spaces.txt"], SubwordTokenizer(tmp_path / "tokenizer.json"))


@given(st.text(max_size=60), st.integers(min_value=1, max_value=7))
def test_text_in_chunks_cut_anywhere_is_decoded_whole(text, size):
    encoded = text.encode()
    chunks = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    assert "".join(decode_lines(chunks)) == text


def test_a_long_text_without_line_ends_streams():
    pieces = list(decode_lines(itertools.repeat(b"ACGT" * (1 << 16), 40)))
    assert sum(map(len, pieces)) == 40 * 4 << 16
    assert max(map(len, pieces)) < 3 << 20


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_is_no_utf8_is_named_with_its_place(tmp_path, size):
    bad = "läuft\n".encode() * 10 + b"\xff" + b"more"
    place = bad.index(b"\xff")
    with pytest.raises(UnicodeDecodeError) as caught:
        list(decode_lines(bad[i : i + size] for i in range(0, len(bad), size)))
    assert caught.value.start == place

    (tmp_path / "good.txt").write_text("good text " * 50)
    tokenizer = train_tokenizer(iter(["good text"]), 300, tmp_path / "tokenizer.json")
    (tmp_path / "bad.txt").write_bytes(bad)
    with pytest.raises(ValueError, match=rf"bad\.txt is not UTF-8 at byte {place}: convert it, or train on bytes"):
        tokenised(tmp_path, [tmp_path / "good.txt", tmp_path / "bad.txt"], tokenizer)
    assert not (tmp_path / "data").exists()
    assert len(tokenised(tmp_path, [tmp_path / "bad.txt"]).train) > 0


def test_bytes_restore_text_and_mark_halves_of_characters():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("ümläut\n")) == "ümläut\n"
    assert tokenizer.decode("ü".encode()[:1]) == "\ufffd"


def damaged_gz(path):
    packed = gzip.compress(os.urandom(10_000))
    path.write_bytes(packed[: len(packed) // 2])
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nowhere", "there is no file or directory .*nowhere"),
        (lambda folder: folder, "the directory .* has no files"),
        (lambda folder: damaged_gz(folder / "half.gz"), "half.gz is not a whole gzip file"),
        (lambda folder: (folder / "empty").write_bytes(b"") or folder / "empty", "the text is empty"),
        (lambda folder: (folder / "a.gz").write_bytes(b"no gz") and folder / "a.gz", "a.gz is not a whole gzip"),
    ],
)
def test_unusable_data_is_named(tmp_path, make, says):
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(ValueError, match=says):
        tokenised(tmp_path, [make(folder)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    documents = find_documents([tmp_path / "a.txt"])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt: No such file"):
        list(documents[0].chunks())


def test_an_empty_file_among_others_does_not_matter(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "b.txt").write_text("")
    corpus = tokenised(tmp_path, [tmp_path / "a.txt", tmp_path / "b.txt"])
    assert text_of(corpus.train) + text_of(corpus.validation) == "text " * 100 + "\0"


def test_too_short_a_text_says_what_to_do(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    corpus = tokenised(tmp_path, [tmp_path / "a.txt"])
    check_length(corpus, seq_len=90)
    with pytest.raises(ValueError, match=r"91 tokens for training where one window takes 92.*smaller --seq-len"):
        check_length(corpus, seq_len=91)


def test_a_damaged_corpus_is_detected(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    tokenised(tmp_path, [tmp_path / "a.txt"])
    with (tmp_path / "data" / "train.bin").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(ValueError, match=r"train\.bin is damaged: 10 bytes instead of 91"):
        Corpus(tmp_path / "data")
    (tmp_path / "data" / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Corpus(tmp_path / "data")


@pytest.mark.parametrize("content", ["no json", "{}"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"t\.json is not a file of the tokenizers library"):
        SubwordTokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match="nowhere is not a file"):
        SubwordTokenizer(tmp_path / "nowhere")
