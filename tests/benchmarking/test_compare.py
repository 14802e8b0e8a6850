"""Other projects beside ours: a package with our import name is imported from its folder, and ours is there again."""

import sys
from pathlib import Path

import pytest

import memory_efficient_attention_pytorch as ours
from tests.benchmarking.scripts import load_benchmark


@pytest.fixture
def compare(tmp_path, monkeypatch):
    script = load_benchmark("compare")
    monkeypatch.setattr(script, "PACKAGES", tmp_path)
    return script


def write_package(folder: Path, name: str, version: str) -> None:
    module = folder / name.replace("-", "_")
    module.mkdir(parents=True)
    (module / "inner.py").write_text("where = __file__\n")
    (module / "__init__.py").write_text("")
    (module / "transformer.py").write_text(f"from {module.name}.inner import where\nlate = lambda: where\n")
    information = folder / f"{module.name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_package_of_our_name_stands_in_only_while_it_is_imported(compare):
    write_package(compare.UPSTREAM.folder, compare.UPSTREAM.distribution, "0.1.6")
    mine, before, path = ours.transformer, dict(sys.modules), list(sys.path)
    with compare.UPSTREAM.imported() as theirs:
        assert theirs is not mine
    assert Path(theirs.late()).is_relative_to(compare.PACKAGES)
    assert sys.modules["memory_efficient_attention_pytorch"] is ours
    assert {name: module for name, module in sys.modules.items() if "memory_efficient" in name} == {
        name: module for name, module in before.items() if "memory_efficient" in name
    }
    assert sys.path == path


def test_our_own_package_does_not_pass_for_upstream(compare):
    assert compare.UPSTREAM.versions() == {}
    write_package(compare.UPSTREAM.folder, compare.UPSTREAM.distribution, "0.1.6")
    assert compare.UPSTREAM.versions() == {"memory-efficient-attention-pytorch": "0.1.6"}


def test_the_package_s_own_folder_goes_before_the_environment(compare):
    installed = compare.Package("numpy", "numpy", ("numpy",))
    assert "numpy" in installed.versions()
    write_package(installed.folder, "numpy", "0.0.1")
    assert installed.versions() == {"numpy": "0.0.1"}


def test_what_is_not_installed_is_refused_with_what_would_install_it(compare, capsys):
    with pytest.raises(SystemExit) as end:
        compare.main(["--systems", "ours", "upstream"])
    assert end.value.code == 2
    assert f"pip install --no-deps --target {compare.PACKAGES}" in " ".join(capsys.readouterr().err.split())
    assert compare.main(["--list"]) == 0
    assert {"ours", "upstream"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert compare.TRANSFORMERS.pip_arguments() == ["install", "transformers"]


def test_another_system_is_prepared_by_the_script_that_knows_it(compare, tmp_path):
    """The fresh process is given the script's own file, by which it finds the system."""
    pytest.importorskip("transformers")
    (system,) = (system for system in compare.OTHERS if system.name == "gpt2")
    assert system.target == f"{Path(compare.__file__).resolve()}:build"
    shape = {"seq_len": 8, "dim": 8, "depth": 1, "heads": 2, "num_tokens": 7}
    report = tmp_path / "report.json"
    compare.build("gpt2", shape=shape, device="cpu", repeats=0, patience=1.0, report=str(report))()
    assert '"parameters"' in report.read_text()
