"""The figures in the README and the docs are those of the results, and a typed-in one is noticed."""

import json

import pytest

from memory_efficient_attention_pytorch.benchmarking.results import Run, begin
from memory_efficient_attention_pytorch.benchmarking.schedule import Settings
from memory_efficient_attention_pytorch.benchmarking.systems import find_systems
from tests.benchmarking.scripts import load_benchmark


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    readme = load_benchmark("readme")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for name, path in {"README": tmp_path / "README.md", "DOCS": tmp_path / "docs" / "benchmarks.md"}.items():
        monkeypatch.setattr(readme, name, path)
        path.parent.mkdir(exist_ok=True)
        path.write_text("# Title\n{}\n{}\n".format(*readme.MARKERS))
    return readme


def save_results(folder, date, units, processor=None, **settings):
    results = begin(Settings(**settings), find_systems(["ours"]))
    results.date = date
    if processor is not None:
        results.machine["processor"] = processor
    shape = results.settings.base
    results.runs = [
        Run("compare", 0, "ours", shape, "measured", peak_bytes=int(units * shape.unit_bytes), seconds=(1.0,))
    ]
    results.save(folder / "results.json")
    (folder / "memory-and-time.png").touch()


def test_the_newest_results_are_written_and_a_changed_figure_is_noticed(checkout, capsys):
    results = checkout.ROOT / "benchmarks" / "results"
    with pytest.raises(ValueError, match="no results"):
        checkout.main([])
    save_results(results / "2026-01-01", "2026-01-01T00:00:00+00:00", 11.5)
    save_results(results / "2026-02-01", "2026-02-01T00:00:00+00:00", 8.5)
    save_results(results / "2026-03-01-quick", "2026-03-01T00:00:00+00:00", 99.5)
    assert checkout.main(["--check"]) == 1
    assert checkout.main([]) == 0
    assert checkout.main(["--check"]) == 0
    for document, link in {
        checkout.README: "(benchmarks/results/2026-02-01/",
        checkout.DOCS: "(../benchmarks/results/2026-02-01/",
    }.items():
        assert "8.5" in document.read_text()
        assert f"![memory and time]{link}memory-and-time.png)" in document.read_text()
    checkout.README.write_text(checkout.README.read_text().replace("8.5", "7.5"))
    capsys.readouterr()
    assert checkout.main(["--check"]) == 1
    assert "README.md: out of date" in capsys.readouterr().out


def test_the_newest_figures_of_each_kind_of_machine_stand_beside_one_another(checkout):
    folder = checkout.ROOT / "benchmarks" / "results"
    save_results(folder / "2025-12-01", "2025-12-01T00:00:00+00:00", 20.5, "A")
    save_results(folder / "2026-01-01", "2026-01-01T00:00:00+00:00", 21.5, "A, family 1")
    save_results(folder / "2026-02-01", "2026-02-01T00:00:00+00:00", 22.5, "A, family 1")
    save_results(folder / "2026-03-01", "2026-03-01T00:00:00+00:00", 23.5, "A, family 1", keep_freed=True)
    save_results(folder / "2026-04-01", "2026-04-01T00:00:00+00:00", 24.5, "B, family 2")
    save_results(folder / "2026-05-01", "2026-05-01T00:00:00+00:00", 25.5, "B, family 2")
    assert checkout.main([]) == 0
    for document in (checkout.README, checkout.DOCS):
        text = document.read_text()
        first, other = text.split("The same on A, family 1")
        assert "B, family 2" in first
        assert "25.5" in first
        assert "2026-02-01:" in other
        assert "22.5" in other
        assert not [units for units in ("20.5", "21.5", "23.5", "24.5") if units in text]


def test_figures_of_models_stand_between_markers_of_their_own(checkout):
    begin, end = checkout.OF_MODELS
    folder = checkout.ROOT / "benchmarks" / "results"
    save_results(folder / "2026-01-01", "2026-01-01T00:00:00+00:00", 8.5)
    checkout.README.write_text(f"{checkout.README.read_text()}{begin}\n{end}\nlast\n")
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "huggingface.md").write_text("| 323 MB |\n")
    assert checkout.main([]) == 0
    assert f"{begin}\n\n| 323 MB |\n\n{end}\nlast\n" in checkout.README.read_text()
    assert "8.5" in checkout.README.read_text()
    (folder / "huggingface" / "huggingface.md").write_text("| 322 MB |\n")
    assert checkout.main(["--check"]) == 1


def test_only_the_lines_between_the_markers_are_rewritten(tmp_path):
    markers, (begin, end) = load_benchmark("markers"), ("<!-- begin -->", "<!-- end -->")
    document = tmp_path / "README.md"
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    block = "a table\n\nand a figure"
    assert markers.rewrite(document, block, (begin, end))
    assert markers.between_markers(document, (begin, end)) == block
    assert document.read_text().startswith(f"before\n{begin}\n")
    assert document.read_text().endswith(f"{end}\nafter\n")
    assert not markers.rewrite(document, block, (begin, end))
    document.write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md"):
        markers.rewrite(document, block, (begin, end))


def test_the_published_figures_are_those_of_the_newest_results(capsys):
    readme = load_benchmark("readme")
    try:
        readme.newest_results(readme.ROOT / "benchmarks" / "results")
    except ValueError:
        pytest.skip("nothing has been measured yet")
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_results_carry_no_path_of_the_machine(tmp_path):
    save_results(tmp_path / "r", "2026-01-01T00:00:00+00:00", 1.0)
    content = json.loads((tmp_path / "r" / "results.json").read_text())
    assert "/" not in json.dumps([content["settings"], content["machine"], content["versions"]])
