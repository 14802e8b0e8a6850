"""`mea generate`: what it prints where, and what it says to a mistake."""

import io
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memory_efficient_attention_pytorch.cli import generate, main
from memory_efficient_attention_pytorch.training.checkpoints import Checkpoints, TrainState
from memory_efficient_attention_pytorch.training.config import TrainConfig, dump_config
from memory_efficient_attention_pytorch.training.model import build_model
from memory_efficient_attention_pytorch.training.optimizer import adamw
from memory_efficient_attention_pytorch.training.tokenizers import ByteTokenizer, SubwordTokenizer, train_tokenizer
from tests.cli import train_command

SHAPE = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "seq_len": 24}
TEXT = "".join(f"line {i} of a téxt to learn, and it is {i * i}\n" for i in range(300))


def make_run(path, seed=0, vocab_size=None, bias=None, **options):
    """A run directory as training leaves it, with random weights and logits moved by ``bias``."""
    config = TrainConfig(**{**SHAPE, "vocab_size": vocab_size, **options})
    path.mkdir()
    (path / "config.toml").write_text(dump_config(config))
    tokenizer = ByteTokenizer()
    if vocab_size is not None:
        tokenizer = train_tokenizer(iter([TEXT]), vocab_size, path / "tokenizer.json")
    torch.manual_seed(seed)
    model = build_model(config, tokenizer.num_tokens)
    with torch.no_grad():
        for token, value in (bias or {}).items():
            model.to_logits[1].bias[token] = value
    optimizer = adamw(model.parameters(), config)
    model(torch.zeros(1, 2, dtype=torch.long), labels=torch.zeros(1, 2, dtype=torch.long)).backward()
    optimizer.step()
    Checkpoints(path / "checkpoints").save(model, optimizer, TrainState(step=1, validation_loss=1.0))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name."""
    folder = tmp_path_factory.mktemp("runs")
    letters = dict.fromkeys(range(97, 107), 4.0)
    return {
        "rotary": make_run(folder / "rotary", bias=letters),
        "learned": make_run(folder / "learned", positions="learned", bias=letters),
        "window": make_run(folder / "window", window=5, bias=letters),
        "subword": make_run(folder / "subword", vocab_size=300),
        "ending": make_run(folder / "ending", bias={0: 50.0}),
    }


@pytest.fixture
def mea(runs, capfdbinary, monkeypatch):
    """Calls `mea generate RUN ...` and returns its status, standard output and standard error."""

    def call(run, *arguments, stdin=None):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
        status = main(["generate", str(runs.get(run, run)), *arguments])
        out, error = capfdbinary.readouterr()
        return status, out.decode(), error.decode()

    return call


# The text


def test_prompt_and_continuation_and_nothing_else(mea):
    status, out, error = mea("rotary", "--prompt", "abc", "--tokens", "12")
    assert status == 0
    assert error == ""
    assert re.fullmatch(r"abc(?s:.{1,12})\n", out)


def test_a_seed_repeats_a_text(mea):
    first, again, other = (mea("rotary", "--prompt", "abc", "--tokens", "12", "--seed", seed)[1] for seed in "112")
    assert first == again != other
    without = {mea("rotary", "--prompt", "abc", "--tokens", "12")[1] for _ in range(3)}
    assert len(without) > 1


def test_temperature_zero_and_one_token_to_choose_from_agree(mea):
    texts = {
        mea("rotary", "--prompt", "abc", "--tokens", "12", *options)[1]
        for options in (["--temperature", "0"], ["--top-k", "1"], ["--top-p", "0.0001"], ["--temperature", "1e-9"])
    }
    assert len(texts) == 1


@pytest.mark.parametrize("run", ["rotary", "learned", "window", "subword"])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_each_of_several_is_what_it_is_alone(mea, run, temperature):
    """Of unequal lengths, and beyond the model's length."""
    prompts = ["a", "a longer prompt, longer than the model is", "bcdefg"]
    options = ["--tokens", "30", "--seed", "5", "--temperature", temperature]
    alone = [mea(run, "--prompt", prompt, *options)[1] for prompt in prompts]
    status, out, _ = mea(run, *itertools.chain(*(("--prompt", prompt) for prompt in prompts)), *options)
    assert status == 0
    assert out == "".join(f"[{i}/3]\n{text}" for i, text in enumerate(alone, 1))


def test_a_prompt_given_twice_is_continued_in_two_ways(mea):
    both = mea("rotary", "--prompt", "ab", "--prompt", "ab", "--tokens", "20", "--seed", "8")[1]
    first, second = (mea("rotary", "--prompt", "ab", "--tokens", "20", "--seed", seed)[1] for seed in "89")
    assert first != second
    assert both == f"[1/2]\n{first}[2/2]\n{second}"


@pytest.mark.parametrize("arguments", [[], ["--prompt", "-"]])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_prompt_from_standard_input(mea, arguments, end):
    status, out, _ = mea("rotary", "--tokens", "9", "--seed", "1", *arguments, stdin=b"two\nlines" + end)
    assert status == 0
    assert out == mea("rotary", "--tokens", "9", "--seed", "1", "--prompt", "two\nlines")[1]


def test_bytes_that_are_no_utf_8(mea):
    status, out, _ = mea("rotary", "--tokens", "9", stdin=b"a\xff\xfeb")
    assert status == 0
    assert out.startswith("a\ufffd\ufffdb")


def test_a_text_ends_with_its_document(mea):
    assert mea("ending", "--prompt", "abc", "--tokens", "20") == (0, "abc\n", "")


@pytest.mark.parametrize(
    ("run", "how"),
    [
        ("rotary", "each token sees the last 24 and none before"),
        ("learned", "the model reads the last 24 again for each token, since its learned positions end there"),
        ("window", "nothing changes, since no token looks back further than the model's window"),
    ],
)
def test_beyond_the_models_length_it_says_what_it_does(mea, run, how):
    assert mea(run, "--prompt", "abcd", "--tokens", "20")[2] == ""
    status, out, error = mea(run, "--prompt", "abcd", "--tokens", "21")
    assert status == 0
    assert error.startswith("mea generate: note: prompt and text may exceed 24 tokens")
    assert how in error
    assert error.count("\n") == 1
    assert "note" not in out


def test_the_better_of_two_checkpoints_and_the_newest(mea, tmp_path):
    run = make_run(tmp_path / "run", bias={97: 50.0})
    config = TrainConfig(**SHAPE)
    model = build_model(config, 256)
    with torch.no_grad():
        model.to_logits[1].bias[98] = 50.0
    optimizer = adamw(model.parameters(), config)
    model(torch.zeros(1, 2, dtype=torch.long), labels=torch.zeros(1, 2, dtype=torch.long)).backward()
    optimizer.step()
    Checkpoints(run / "checkpoints").save(model, optimizer, TrainState(step=2, validation_loss=1.5))
    assert mea(run, "--prompt", ".", "--tokens", "3")[1] == ".aaa\n"
    assert mea(run, "--prompt", ".", "--tokens", "3", "--checkpoint", "last")[1] == ".bbb\n"

    (run / "checkpoints/step-00000002/model.safetensors").write_bytes(b"cut short")
    status, out, error = mea(run, "--prompt", ".", "--tokens", "3", "--checkpoint", "last")
    assert (status, out) == (0, ".aaa\n")
    assert error.startswith("mea generate: note: checkpoint ")
    assert "truncated or altered" in error
    assert error.count("\n") == 1


# How it is shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def text_of(tokens, prompt=b"", tokenizer=None):
    text = generate._Text(tokenizer or ByteTokenizer(), list(prompt))
    pieces = [text.take()]
    for token in tokens:
        text.add(token)
        pieces.append(text.take())
    text.ended = True
    return [*pieces, text.take()]


def test_a_character_is_shown_once_it_is_whole():
    assert text_of("é€😀x".encode(), prompt=b"a") == ["a", "", "é", "", "", "€", "", "", "", "😀", "x", ""]


def test_a_prompt_that_ends_within_a_character():
    assert text_of("€".encode()[2:], prompt="a€".encode()[:3]) == ["a", "€", ""]


def test_the_beginning_of_a_character_at_the_very_end():
    assert "".join(text_of("a€".encode()[:3])) == "a\ufffd"


@given(st.lists(st.integers(1, 255), max_size=400), st.binary(max_size=5))
def test_pieces_are_the_whole_text(tokens, prompt):
    prompt = prompt.replace(b"\0", b"")
    pieces = text_of(tokens, prompt)
    assert "".join(pieces) == (prompt + bytes(tokens)).decode("utf-8", errors="replace")


def test_pieces_of_subwords_are_the_whole_text(tmp_path):
    tokenizer = train_tokenizer(iter([TEXT]), 280, tmp_path / "tokenizer.json")
    text = "line 7 of téxts:  €9,\tand 😀\n" * 20
    tokens = tokenizer.encode(text)
    assert "".join(text_of(tokens[3:], tokens[:3], tokenizer)) == text


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """Spells what is not in its vocabulary in bytes, as those of Llama do."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    spelling = tokenizers.Tokenizer(model)
    spelling.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    decoders = tokenizers.decoders
    spelling.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    spelling.save(str(path))
    return SubwordTokenizer(path)


@pytest.mark.parametrize("text", ["b😀c", "b€c", "b好吗c", "é" * 100, "x" * 70 + "日本語 " * 30], ids=range(5))
def test_characters_spelt_in_bytes_are_shown_once_they_are_whole(byte_fallback, text):
    pieces = text_of(byte_fallback.encode(text), byte_fallback.encode("a"), byte_fallback)
    assert "".join(pieces) == "a" + text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_first_text_streams_and_the_next_wait():
    out = io.StringIO()
    texts = [generate._Text(ByteTokenizer(), list(prompt)) for prompt in (b"a", b"b", b"c")]
    printer = generate._Printer(texts, out)
    printer.show()
    shown = [out.getvalue()]
    for step in (b"xyz", b"x\0z", b"\0.z"):
        for text, token in zip(texts, step, strict=True):
            text.add(token)
        printer.show()
        shown.append(out.getvalue())
    assert shown == ["[1/3]\na", "[1/3]\nax", "[1/3]\naxx", "[1/3]\naxx\n[2/3]\nby\n[3/3]\nczzz"]


def test_control_characters_do_not_reach_a_terminal():
    texts = [generate._Text(ByteTokenizer(), list(b"a\x1b[2Jb\tc\n\r\x7f"))]
    for out, expected in ((io.StringIO(), "a\x1b[2Jb\tc\n\r\x7f"), (Terminal(), "a·[2Jb\tc\n··")):
        texts[0].taken = 0
        generate._Printer(texts, out).show()
        assert out.getvalue() == expected


def test_an_interrupted_text_ends_with_its_line(monkeypatch, capsys):
    def steps():
        yield torch.tensor([ord("b")])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate._print_texts([generate._Text(ByteTokenizer(), [ord("a")])], steps())
    assert capsys.readouterr().out == "ab\n"


# Mistakes

MISTAKES = {
    "no run": (["--prompt", "a"], "nowhere", "there is no run directory nowhere"),
    "tokens": (["--prompt", "a", "--tokens", "0"], "rotary", "--tokens must be at least 1, got 0"),
    "tokens no number": (["--prompt", "a", "--tokens", "x"], "rotary", "argument --tokens: invalid int value: 'x'"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "rotary", "temperature: expected a finite number"),
    "top-k": (["--prompt", "a", "--top-k", "0"], "rotary", "top_k: expected a positive integer, got 0"),
    "top-p": (["--prompt", "a", "--top-p", "1.5"], "rotary", "top_p: expected a number above 0 and at most 1, got 1.5"),
    "seed": (["--prompt", "a", "--seed", "-1"], "rotary", "--seed must be a whole number from 0"),
    "empty prompt": (["--prompt", ""], "rotary", "the prompt is empty"),
    "empty input": ([], "rotary", "standard input is empty"),
    "no UTF-8": (["--prompt", "a\udcff"], "subword", "the prompt is not UTF-8, which this run's tokenizer needs"),
    "unknown option": (["--prompt", "a", "--temprature", "1"], "rotary", "(did you mean --temperature?)"),
    "checkpoint": (["--prompt", "a", "--checkpoint", "first"], "rotary", "invalid choice: 'first'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mea, name):
    arguments, run, message = MISTAKES[name]
    status, out, error = mea(run, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("mea generate: ")
    assert error.count("\n") == 1
    assert message in error


def test_debug_shows_where_it_came_from(mea):
    with pytest.raises(ValueError, match="top_k"):
        mea("rotary", "--prompt", "a", "--top-k", "0", "--debug")


def test_no_prompt_on_a_terminal(runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["generate", str(runs["rotary"])]) == 2
    assert "no prompt: give --prompt TEXT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "config.toml").unlink(), "is not a run directory: it has no config.toml"),
        (lambda run: replace(run, "dim = 16", "dim = 18"), "are not those of the model in the run's config.toml"),
        (lambda run: replace(run, "format = 1", "format = 99"), "has format 99 and this version reads format 1"),
        (lambda run: replace(run, "depth = 2", "depht = 2"), "unknown key 'depht'"),
        (
            lambda run: (run / "checkpoints/step-00000001/model.safetensors").write_bytes(b""),
            "holds no intact checkpoint",
        ),
    ],
    ids=["no config", "other shape", "other format", "unknown key", "damaged"],
)
def test_a_run_that_cannot_be_used(mea, tmp_path, change, message):
    run = make_run(tmp_path / "run")
    change(run)
    status, out, error = mea(run, "--prompt", "a")
    assert (status, out) == (2, "")
    last = error.splitlines()[-1]
    assert last.startswith("mea generate: ")
    assert message in last
    assert "Traceback" not in error


def replace(run, old, new):
    text = (run / "config.toml").read_text()
    assert old in text
    (run / "config.toml").write_text(text.replace(old, new, 1))


# The real commands, one after the other


def test_a_trained_run_writes_text(here):
    (here / "text.txt").write_text(TEXT)
    tiny = ["--dim=16", "--depth=2", "--heads=2", "--dim-head=8", "--seq-len=16", "--batch-size=2", "--steps=2"]
    options = ["--data=text.txt", "--vocab-size=300", "--quiet", "--sample-every=0", *tiny]
    result = train_command.mea(here, "train", *options)
    assert result.status == 0, result.error
    arguments = ["--tokens", "40", "--seed", "0"]
    result = train_command.mea(here, "generate", "runs/1", *arguments, stdin="a téxt\n".encode())
    assert result.status == 0, result.error
    assert result.out.startswith("a téxt")
    assert len(result.out) > 20
    assert "note: prompt and text may exceed 16 tokens" in result.error
    again = train_command.mea(here, "generate", "runs/1", "--prompt", "a téxt", *arguments)
    assert again.out == result.out

    result = train_command.mea(here, "generate", "runs/2", "--prompt", "a")
    assert (result.status, result.out) == (2, "")
    assert result.error == "mea generate: there is no run directory runs/2\n"
