"""What is missing is named, with the extra that brings it."""

import sys

import pytest

from memory_efficient_attention_pytorch.cli import main
from memory_efficient_attention_pytorch.common.errors import MissingExtraError, brought_by


def test_a_missing_package_names_the_extra_that_brings_it():
    command = r"^nowhere is not installed: pip install 'memory-efficient-attention-pytorch\[train\]'$"
    with pytest.raises(MissingExtraError, match=command) as caught, brought_by("train"):
        import nowhere.inside  # noqa: F401
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.name == "nowhere"


def test_other_errors_are_passed_on():
    with pytest.raises(ImportError, match="cannot import name") as caught, brought_by("train"):
        from sys import nothing  # noqa: F401
    assert not isinstance(caught.value, MissingExtraError)


@pytest.mark.parametrize("package", ["accelerate", "matplotlib", "tomli_w", "rich"])
def test_training_says_which_extra_it_lacks_before_it_begins(package, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    for loaded in [name for name in sys.modules if name.startswith(f"{package}.")]:  # by other tests
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["train", "--data", "text.txt", "--steps=1"]) == 2
    expected = f"{package} is not installed: pip install 'memory-efficient-attention-pytorch[train]'"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
