"""A package with our import name is imported from its folder, and ours is there again afterwards."""

import sys
from pathlib import Path

import memory_efficient_attention_pytorch as ours
from memory_efficient_attention_pytorch.benchmarking.packages import TRANSFORMERS, UPSTREAM, Package


def write_package(folder: Path, name: str, version: str) -> None:
    module = folder / name.replace("-", "_")
    module.mkdir(parents=True)
    (module / "inner.py").write_text("where = __file__\n")
    (module / "__init__.py").write_text(f"from {module.name}.inner import where\nlate = lambda: where\n")
    information = folder / f"{module.name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_package_of_our_name_stands_in_only_while_it_is_imported(tmp_path):
    write_package(UPSTREAM.folder(tmp_path), UPSTREAM.distribution, "0.1.6")
    before, path = dict(sys.modules), list(sys.path)
    with UPSTREAM.imported(tmp_path) as theirs:
        assert theirs is not ours
    assert Path(theirs.late()).is_relative_to(tmp_path)
    assert sys.modules["memory_efficient_attention_pytorch"] is ours
    assert {name: module for name, module in sys.modules.items() if "memory_efficient" in name} == {
        name: module for name, module in before.items() if "memory_efficient" in name
    }
    assert sys.path == path


def test_our_own_package_does_not_pass_for_upstream(tmp_path):
    assert UPSTREAM.version(tmp_path) is None
    write_package(UPSTREAM.folder(tmp_path), UPSTREAM.distribution, "0.1.6")
    assert UPSTREAM.version(tmp_path) == "0.1.6"


def test_the_package_s_own_folder_goes_before_the_environment(tmp_path):
    installed = Package("numpy", "numpy", ("numpy",))
    assert installed.version(tmp_path) is not None
    write_package(installed.folder(tmp_path), "numpy", "0.0.1")
    assert installed.version(tmp_path) == "0.0.1"


def test_pip_is_asked_for_a_folder_apart_or_for_our_extra(tmp_path):
    arguments = UPSTREAM.pip_arguments(tmp_path)
    assert arguments[:4] == ["install", "--no-deps", "--target", str(tmp_path / UPSTREAM.distribution)]
    assert TRANSFORMERS.pip_arguments(tmp_path) == ["install", "memory-efficient-attention-pytorch[huggingface]"]
