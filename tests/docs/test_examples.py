"""Every public name has an example in its docstring that runs, and stands in the reference."""

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from memory_efficient_attention_pytorch.cli import COMMANDS, main

PACKAGE = "memory_efficient_attention_pytorch"
DOCS = Path(__file__).parents[2] / "docs"
PUBLIC = [
    (module, name)
    for module in ("", ".distributed", ".huggingface", ".planner", ".recompute", ".training")
    for name in importlib.import_module(PACKAGE + module).__all__
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of a model that was hardly trained."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    sizes = "--dim 32 --depth 1 --heads 2 --dim-head 16 --seq-len 32 --batch-size 2 --steps 2"
    assert main(f"train --quiet --data {folder}/text.txt --out {folder}/run {sizes}".split()) == 0
    return folder / "run"


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module}.{name}".strip(".") for module, name in PUBLIC])
def test_the_example_of_a_public_name_runs(module, name, request):
    found = getattr(importlib.import_module(PACKAGE + module), name)
    if isinstance(found, tuple):  # a constant has no docstring of its own
        return
    given = {"run": request.getfixturevalue("run")} if "(run" in found.__doc__ else {}
    (example,) = doctest.DocTestFinder(recurse=False).find(found, name, module=False, globs=given)
    assert re.search(rf"\b{name}\b", example.docstring[example.docstring.index("Examples:") :])
    outcome = doctest.DocTestRunner().run(example)
    assert outcome.attempted
    assert not outcome.failed


def test_every_public_name_stands_in_the_reference():
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    # plan and max_seq_len are names of two modules, and stand there once.
    expected = {
        f"{PACKAGE}{module}.{name}" for module, name in PUBLIC if module != ".planner" or ("", name) not in PUBLIC
    }
    assert sorted(shown) == sorted(expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_runs(command, run, monkeypatch, capsys):
    page = (DOCS / "reference" / "commands.md").read_text()
    assert f"<!-- mea {command} --help -->" in page
    (line,) = re.findall(rf"^\$ mea ({command} .*|{command})$", page, re.MULTILINE)
    monkeypatch.chdir(run.parent)
    arguments = shlex.split(line)
    if command == "train":  # the run that the others read is there
        arguments[arguments.index("run")] = "another"
    assert main(arguments) == 0
    assert capsys.readouterr().out
