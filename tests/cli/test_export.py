"""`mea export`: what AutoModelForCausalLM and AutoTokenizer load is what `mea train` made."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_efficient_attention_pytorch.cli import main
from memory_efficient_attention_pytorch.huggingface import MemoryEfficientForCausalLM
from memory_efficient_attention_pytorch.training.run_directory import load_run

from .test_generate import make_run

TEXTS = ("A téxt, with two  spaces\nand\tlines — 日本", "line 7 of a text")


@pytest.mark.parametrize("options", [{}, {"vocab_size": 300, "window": 5}], ids=["bytes", "subwords"])
def test_the_exported_model_and_tokenizer_are_those_of_the_run(tmp_path, capsys, options):
    own = load_run(make_run(tmp_path / "run", **options))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    assert "exported" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == own.tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == own.tokenizer.num_tokens
    assert tokenizer.eos_token_id == own.tokenizer.end_id == model.config.eos_token_id
    x = torch.tensor([own.tokenizer.encode(TEXTS[1])[:16]])
    assert torch.equal(model(x).logits, own.model(x))


def test_a_damaged_checkpoint_is_told_in_a_line(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    first, second = (run / f"checkpoints/step-0000000{step}" for step in (1, 2))
    shutil.copytree(first, second)
    state = json.loads((first / "state.json").read_text())
    (second / "state.json").write_text(json.dumps({**state, "step": 2}))
    assert main(["export", str(run), str(tmp_path / "exported"), "--checkpoint", "last"]) == 0
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "damaged" in line)
    assert said.startswith(f"mea export: note: checkpoint {second} is damaged (state.json is ")


def test_a_directory_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "full")]) == 2
    assert "empty directory" in capsys.readouterr().err


def test_a_directory_that_is_there_is_filled_not_replaced(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "mine").mkdir(mode=0o700)
    before = (tmp_path / "mine").stat()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "mine")]) == 0
    after = (tmp_path / "mine").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "mine/model.safetensors").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing_and_is_told(tmp_path, capsys, monkeypatch, there):
    make_run(tmp_path / "run")
    if there:
        (tmp_path / "exported").mkdir()

    def fail(model, directory):
        (directory / "config.json").write_text("{}")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(MemoryEfficientForCausalLM, "save_pretrained", fail)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 1
    assert "exported (No space left on device): nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not there or not list((tmp_path / "exported").iterdir())


def test_a_name_that_safetensors_cannot_write_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "e\udce9")]) == 2
    assert "DIR: expected a name in UTF-8" in capsys.readouterr().err
