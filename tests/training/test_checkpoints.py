import os
import shutil
import subprocess

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch.training import checkpoints as module
from memory_efficient_attention_pytorch.training.checkpoints import (
    Checkpoints,
    TrainState,
    load_optimizer,
    load_weights,
)
from memory_efficient_attention_pytorch.training.files import WRITE_ERRORS, write_atomically


def trained(steps=2, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2]},
            {"params": [p for p in model.parameters() if p.ndim < 2]},
        ]
    )
    for _ in range(steps):
        take_step(model, optimizer)
    return model, optimizer


def take_step(model, optimizer):
    model(torch.linspace(-1, 1, 8).reshape(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def save_steps(store, losses):
    model, optimizer = trained()
    for step, loss in losses.items():
        store.save(model, optimizer, TrainState(step=step, validation_loss=loss))


def steps_of(store):
    return sorted(int(path.name.split("-")[1]) for path in store.root.iterdir())


def test_training_goes_on_from_a_checkpoint_to_the_bit(store):
    model, optimizer = trained()
    store.save(model, optimizer, TrainState(step=2, tokens=64))
    take_step(model, optimizer)

    other, other_optimizer = trained(steps=0, seed=1)
    found = store.find()
    load_weights(other, found)
    load_optimizer(other, other_optimizer, found)
    assert found.state == TrainState(step=2, tokens=64)
    assert not same(model, other)
    take_step(other, other_optimizer)
    assert same(model, other)


def test_tied_weights_are_stored_once_and_come_back_tied(store):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer)
    store.save(model, optimizer, TrainState(step=1))
    other = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    other[1].weight = other[0].weight
    load_weights(other, store.find())
    assert same(model, other)
    assert other[1].weight is other[0].weight


def test_last_and_best(store):
    save_steps(store, {10: 3.0, 20: 2.0, 30: 2.5, 35: None})
    assert store.find("last").state.step == 35
    assert store.find("best").state.step == 20
    with pytest.raises(ValueError, match="checkpoint must be 'last' or 'best', got 'first'"):
        store.find("first")


def test_best_means_last_when_nothing_was_measured(store):
    save_steps(store, {10: None, 20: None})
    assert store.find("best").state.step == 20


def test_the_newest_and_the_best_are_kept(store):
    save_steps(store, {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.6, 50: None})
    store.prune(keep=2)
    assert steps_of(store) == [20, 40, 50]


@pytest.mark.parametrize(("losses", "kept"), [([None] * 4, [40]), ([2.0, 2.0, 3.0, 3.0], [20, 40])])
def test_the_best_that_is_kept_is_the_one_that_is_found(store, losses, kept):
    save_steps(store, dict(zip((10, 20, 30, 40), losses, strict=True)))
    best = store.find("best").state.step
    store.prune(keep=1)
    assert steps_of(store) == kept
    assert store.find("best").state.step == best


def test_sums_are_those_of_sha256sum(store):
    save_steps(store, {10: 3.0})
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=store.find().path, check=True, capture_output=True
    )


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(store, name, damage):
    save_steps(store, {10: 3.0, 20: 2.0})
    path = store.find().path / name
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-9])
    elif damage == "alter":
        path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    else:
        path.unlink()
    reports = []
    assert store.find("last", reports.append).state.step == 10
    assert len(reports) == 1
    assert "step-00000020" in reports[0]
    assert "damaged" in reports[0]


def test_damage_is_a_warning_unless_someone_listens(store):
    save_steps(store, {10: 3.0})
    (store.find().path / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"model\.safetensors is truncated or altered"):
        assert store.find() is None


@pytest.mark.parametrize("failing", ["save_model", "save_file", "sha256"])
def test_a_write_that_fails_leaves_what_was_there(store, monkeypatch, failing):
    save_steps(store, {10: 3.0, 20: 2.0})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(WRITE_ERRORS, match="No space left"):
        save_steps(store, {20: 1.0, 30: 1.0})
    monkeypatch.undo()
    assert steps_of(store) == [10, 20]
    assert store.find().state.validation_loss == 2.0


def test_a_write_cut_short_by_a_kill_is_not_seen_and_is_cleared(store):
    save_steps(store, {10: 3.0})
    partial = store.root / ".step-00000020.partial"
    shutil.copytree(store.find().path, partial)
    os.mkdir(store.root / ".step-00000005.discarded")
    assert store.find().state.step == 10
    store.remove_unfinished()
    assert [path.name for path in store.root.iterdir()] == ["step-00000010"]


def test_a_checkpoint_is_replaced_whole(store):
    save_steps(store, {10: 3.0})
    save_steps(store, {10: 2.0})
    assert steps_of(store) == [10]
    assert store.find().state.validation_loss == 2.0


def damage(store, step):
    with (store.root / f"step-{step:08d}" / "optimizer.safetensors").open("r+b") as file:
        file.truncate(8)


def test_what_lies_beyond_a_step_gets_another_name(store):
    save_steps(store, {10: 3.0, 20: 2.0, 30: 2.0})
    for number in ("", "1"):
        store.set_aside_after(20)
        assert (store.root / "step-00000030").exists(), "it is intact"
        damage(store, 30)
        store.set_aside_after(20)
        assert (store.root / f"step-00000030.damaged{number}/model.safetensors").exists()
        assert store.find().state.step == 20
        save_steps(store, {30: 1.0})
    assert store.find().state.step == 30


def test_what_belongs_to_someone_else_is_left_alone(store):
    save_steps(store, {10: 3.0})
    theirs = {
        "step-00000006.bak": "directory",
        "step-00000010-before-the-change": "directory",
        "step-6": "directory",
        ".step-00000006.partial.mine": "directory",
        "step-00000006.tar.gz": "file",
        "step-00000007": "file",
        ".step-00000008.partial": "file",
        "notes.txt": "file",
    }
    for name, kind in theirs.items():
        if kind == "directory":
            shutil.copytree(store.root / "step-00000010", store.root / name)
        else:
            (store.root / name).write_text("mine")
    elsewhere = store.root.parent / "elsewhere"
    shutil.copytree(store.root / "step-00000010", elsewhere)
    (store.root / "step-00000009").symlink_to(elsewhere)
    save_steps(store, {11: 3.0, 12: 2.0, 13: 2.5})
    assert store.find().state.step == 13
    store.prune(keep=1)
    damage(store, 13)
    store.set_aside_after(12)
    store.remove_unfinished()
    ours = {"step-00000012", "step-00000013.damaged"}
    assert {path.name for path in store.root.iterdir()} == {*theirs, *ours, "step-00000009"}
    assert (elsewhere / "model.safetensors").exists()


def test_a_checkpoint_in_which_the_user_put_something_is_kept(store):
    save_steps(store, {8: 3.0, 9: 3.0, 10: 3.0, 11: 3.0, 12: 2.0, 13: 2.5})
    (store.root / "step-00000008/.DS_Store").write_text("the system's")
    (store.root / "step-00000009/SHA256SUMS").unlink()
    (store.root / "step-00000010/notes.txt").write_text("mine")
    shutil.copytree(store.root / "step-00000011", store.root / "step-0000000011")  # no name of ours
    store.prune(keep=1)
    names = {path.name for path in store.root.iterdir()}
    assert names == {"step-00000010", "step-0000000011", "step-00000012", "step-00000013"}


def test_checkpoints_of_another_step_than_their_names_are_told(store):
    save_steps(store, {10: 3.0, 11: 2.0})
    assert store.renamed() == []
    elsewhere = store.root.parent / "elsewhere"
    (store.root / "step-00000010").rename(elsewhere)
    (store.root / "step-00000010").symlink_to(elsewhere)
    assert store.renamed() == [], "moved, with a link in its place"
    (store.root / "step-00000016").symlink_to(elsewhere)
    shutil.copytree(store.root / "step-00000011", store.root / "step-00000099")
    assert sorted(store.renamed()) == ["step-00000016 is of step 10", "step-00000099 is of step 11"]


def test_checkpoints_that_cannot_be_reached_are_no_missing_ones(store):
    assert store.find() is None
    store.root.symlink_to(store.root.parent / "not-mounted")
    with pytest.raises(FileNotFoundError, match=store.root.name):
        store.find()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_of_a_checkpoints_name_is_told(store, kind):
    store.root.mkdir(parents=True, exist_ok=True)
    path = store.root / "step-00000010"
    path.write_text("mine") if kind == "file" else path.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="something else has the name, which is to be moved away"):
        save_steps(store, {10: 3.0})
    assert os.path.lexists(path)


@pytest.mark.parametrize("state", ['{"step": "six"}', '{"step": -1}', '{"step": 1, "seconds": "long"}', "[]"])
def test_a_state_of_other_kinds_is_damage(store, state):
    save_steps(store, {10: 3.0})
    (store.root / "step-00000010/state.json").write_text(state)
    said = []
    assert store.find(report=said.append) is None
    assert len(said) == 1
    assert "is damaged" in said[0]


def test_steps_beyond_eight_digits_are_in_order(store):
    save_steps(store, {99_999_999: 3.0, 100_000_000: 2.0})
    assert store.find().state.step == 100_000_000
    damage(store, 100_000_000)
    store.set_aside_after(99_999_999)
    assert (store.root / "step-100000000.damaged").exists()
    assert store.find().state.step == 99_999_999


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "first")

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(path, "second")
    assert path.read_text() == "first"
