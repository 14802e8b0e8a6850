import dataclasses
import os
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_efficient_attention_pytorch.training.config import FORMAT, TrainConfig, dump_config, load_config


def test_written_and_read_back_is_the_same(tmp_path):
    config = TrainConfig(
        data=('with "quotes" and \\', "ümläut 🙂", "tab\tdel\x7f"), dim=64, learning_rate=3e-05, exact=True, kv_heads=2
    )
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@given(st.text(), st.floats(min_value=1e-300, max_value=1e300), st.integers(min_value=0, max_value=1 << 62))
def test_any_string_and_number_survives_toml(text, number, seed):
    config = TrainConfig(tokenizer=text, learning_rate=number, seed=seed) if text.isprintable() else TrainConfig()
    read = tomllib.loads(dump_config(config))
    assert read.pop("format") == FORMAT
    assert TrainConfig(**read) == config


def test_a_path_that_is_no_utf8_survives_toml(tmp_path):
    paths = [os.fsdecode(b"/texts/l\xe4uft 100%.txt"), "/texts/läuft.txt", "-"]
    config = TrainConfig(data=tuple(paths), tokenizer=paths[0])
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_byte_order_mark_is_no_part_of_the_configuration(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("steps = 7\n", encoding="utf-8-sig")
    assert load_config(path) == TrainConfig(steps=7)


def test_defaults_left_out_are_taken(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("steps = 7\n")
    assert load_config(path) == TrainConfig(steps=7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat = 1", "unknown key 'learning_rat'.*did you mean learning_rate"),
        ("steps = ", "not valid TOML"),
        ("steps = 1.5", "steps must be a whole number, got 1.5"),
        ("steps = true", "steps must be a whole number, got True"),
        (f"seed = {2**63}", r"seed must be below 2\*\*63, got 9223372036854775808"),
        ("steps = 0", "steps must be a finite number of at least 1, got 0"),
        ("learning_rate = nan", "learning_rate must be a finite number"),
        ("learning_rate = inf", "learning_rate must be a finite number"),
        ("learning_rate = 0", "learning_rate must be above 0"),
        ("learning_rate = 'fast'", "learning_rate must be a number, got 'fast'"),
        ("data = 'a.txt'", "data must be a list of strings"),
        ("data = ['-', '-']", "standard input .* more than once"),
        ("positions = 'rotery'", "positions must be one of .*did you mean rotary"),
        ("tokenizer = 'a'\nvocab_size = 300", "contradict"),
        ("vocab_size = 100", "vocab_size must be a finite number of at least 257"),
        ("exact = true\nreversible = false", "contradict"),
        ("heads = 6\nkv_heads = 4", "kv_heads must divide heads"),
        ("dim_head = 15", "rotary positions need an even dim_head, got 15"),
        ("validation_fraction = 1", "validation_fraction must lie between 0 and 1"),
        ("dropout = 1", "dropout must be below 1"),
        ("final_learning_rate = 2", "final_learning_rate is a part of the peak"),
        (f"format = {FORMAT + 1}", f"has format {FORMAT + 1} and this version reads format {FORMAT}"),
    ],
)
def test_mistakes_are_named(tmp_path, text, says):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the configuration .*nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")


def test_changes_are_checked():
    assert TrainConfig().updated({"steps": 5}) == TrainConfig(steps=5)
    with pytest.raises(ValueError, match=r"unknown key 'step'.*did you mean steps"):
        TrainConfig().updated({"step": 5})


def test_every_option_explains_itself():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"]
        assert field.metadata["group"]


@pytest.mark.parametrize("value", [2**63 - 2, 2**43])
@pytest.mark.parametrize(
    "name", ["seq_len", "batch_size", "accumulation", "dim", "heads", "dim_head", "ff_mult", "depth", "vocab_size"]
)
def test_sizes_beyond_any_machine_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*(more than any machine holds|must be at most)"):
        TrainConfig(**{name: value})


def test_long_sequences_and_large_models_are_not():
    TrainConfig(seq_len=2**24, batch_size=1, dim=8192, heads=64, dim_head=128, depth=128, accumulation=1024)
