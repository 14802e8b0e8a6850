"""Documents, tokenizers and what they become on disk."""

import gzip
import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_gz_is_unpacked(tmp_path):
    text = "packed text\n" * 5000
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    corpus = tokenised(tmp_path, [tmp_path / "a.txt.gz"])
    assert text_of(corpus.train) + text_of(corpus.validation) == text + "\0"


def test_directories_leave_out_hidden_files(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("b.txt", "sub/a.txt", ".secret", ".git/config"):
        (folder / name).write_text("text")
    assert [document.path.name for document in find_documents([folder])] == ["b.txt", "a.txt"]


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
