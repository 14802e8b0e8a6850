"""The package's own names: loaded when they are used, and the same in whatever order things are imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memory_efficient_attention_pytorch as package

NAME = "memory_efficient_attention_pytorch"


def python(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_every_public_name_is_there_and_listed():
    assert sorted(package._HOMES) == package.__all__
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__name__ == name


def test_the_citation_and_the_changelog_are_of_this_version():
    root = Path(__file__).parent.parent
    assert f"\nversion: {package.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {package.__version__} (" in (root / "CHANGELOG.md").read_text()


def test_the_versions_admitted_are_those_that_workflows_test():
    root = Path(__file__).parent.parent
    if not (root / ".github").is_dir():
        pytest.skip("an sdist has no workflows")
    project, contributing = ((root / name).read_text() for name in ("pyproject.toml", "CONTRIBUTING.md"))
    daily, nightly = ((root / ".github/workflows" / name).read_text() for name in ("tests.yml", "nightly.yml"))
    oldest, beyond = map(int, re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', project).groups())
    tested = [int(minor) for minor in re.findall(r'"2\.(\d+)\.\d+"', nightly)]
    assert (min(tested), max(tested)) == (oldest, beyond - 1)
    assert f"PyTorch from 2.{oldest} to 2.{beyond - 1} " in contributing
    pythons = sorted(int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", project))
    (matrix,) = re.findall(r"python-version: \[(.*)\]", daily)
    assert [int(minor) for minor in re.findall(r"3\.(\d+)", matrix)] == [pythons[0], pythons[-1]]
    assert f"Python 3.{pythons[0]} to 3.{pythons[-1]};" in contributing


def test_type_checkers_see_what_runs():
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert set(seen) == set(package.__all__)
    for name, module in seen.items():
        package.__getattr__(module.split(".")[0])
        assert getattr(sys.modules[f"{NAME}.{module}"], name) is getattr(package, name)


def test_modules_are_attributes_and_what_is_no_name_is_none():
    assert package.transformer.Transformer is package.Transformer
    for name in ("nothing", "__wrapped__", "__main__"):
        assert not hasattr(package, name)
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from memory_efficient_attention_pytorch import nothing  # noqa: F401


# A module has the name of a function, which is the package's attribute, as it was in version 0.1.
ORDERS = f"""
import os, sys, types
import torch

PROGRAMS = [
    "from {NAME} import memory_efficient_attention as f",
    "from {NAME} import *; f = memory_efficient_attention",
    "import {NAME}.memory_efficient_attention; from {NAME} import memory_efficient_attention as f",
    "import {NAME}.memory_efficient_attention as f",
    "import {NAME}.transformer as t, {NAME} as p; f = p.memory_efficient_attention",
    "from {NAME}.memory_efficient_attention import Attention; from {NAME} import memory_efficient_attention as f",
    "import importlib, {NAME} as p; importlib.import_module('{NAME}.memory_efficient_attention'); "
    "f = p.memory_efficient_attention",
    "import {NAME} as p; f = p.memory_efficient_attention; import {NAME}.memory_efficient_attention; "
    "assert p.memory_efficient_attention is f",
]
for program in PROGRAMS:
    assert not [name for name in sys.modules if name.startswith("{NAME}")]
    child = os.fork()
    if not child:
        exec(program)
        module = sys.modules["{NAME}.memory_efficient_attention"]
        os._exit(not (isinstance(f, types.FunctionType) and f is module.memory_efficient_attention))
    _, status = os.waitpid(child, 0)
    assert status == 0, program
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_the_function_wins_over_the_module_of_its_name_in_any_order():
    done = python(ORDERS)
    assert done.returncode == 0, done.stderr


LIGHT = f"""
import sys
import {NAME}
from {NAME}.cli import main

assert main(["--help"]) == 0 and main([]) == 0
assert main(["trian"]) == main(["train", "--dim", "0"]) == main(["generate", "x", "--tokens", "0"]) == 2
for command in ("train", "generate", "plan", "bench"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert not end.code
assert "torch" not in sys.modules
"""


def test_help_and_mistakes_do_not_wait_for_pytorch():
    done = python(LIGHT)
    assert done.returncode == 0, done.stderr
