"""What the site is built with beyond MkDocs' own checks: nothing from other hosts, links to the repository's files."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra docs")

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("suffix", "text", "addresses"),
    [
        (".html", '<script src="https://cdn.org/a.js"></script>', ["https://cdn.org/a.js"]),
        (".html", '<link rel="preconnect" href="//fonts.org">', ["//fonts.org"]),
        (".html", '<pre class="mermaid">', ["the script for mermaid"]),
        (".html", '<a href="https://arxiv.org/abs/1">paper</a><img src="../a.svg"><script src="a.js"></script>', []),
        (".css", "@import 'https://a.org'; x { background: url(//c.org/d.png) }", ["https://a.org", "//c.org/d.png"]),
        (".css", "x { background: url(data:image/svg+xml;charset=utf-8,a) url('b.png') }", []),
    ],
)  # fmt: skip
def test_what_is_loaded_from_another_host_is_found(hooks, suffix, text, addresses):
    assert hooks.foreign(text, suffix) == addresses


@pytest.fixture
def site(tmp_path, hooks):
    """Build a repository of a few files into a site; its warnings are returned beside it."""

    def make(pages, caplog):
        for name, text in pages.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        shutil.copy(ROOT / "docs" / "hooks.py", tmp_path / "docs")
        (tmp_path / "mkdocs.yml").write_text(
            "site_name: small\nplugins: []\nuse_directory_urls: false\nexclude_docs: '*.py'\nhooks: [docs/hooks.py]\n"
            "validation: {links: {anchors: warn, unrecognized_links: warn}}"
        )
        build(load_config(str(tmp_path / "mkdocs.yml")))
        return tmp_path / "site", [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    return make


def test_links_to_files_outside_the_documentation_lead_to_pages_of_the_site(site, caplog):
    pages = {
        "docs/index.md": "[a](../results/a.md#top) and [b](how/b.md)",
        "docs/how/b.md": "![p](../../results/p.png) [home](../index.md)",
        "results/a.md": "# Top\n[back](../docs/how/b.md) [p](p.png) [on](README.md)",
        "results/README.md": "# Read me",
        "results/p.png": "",
        "results/unlinked.md": "",
    }
    built, warnings = site(pages, caplog)
    # The built-in theme of these pages loads fonts and scripts, which the hook says, too.
    assert [message for message in warnings if "another host" not in message] == []
    assert 'href="repository/results/a.html#top"' in (built / "index.html").read_text()
    assert 'src="../repository/results/p.png"' in (built / "how" / "b.html").read_text()
    found = (built / "repository" / "results" / "a.html").read_text()
    assert 'href="../../how/b.html"' in found
    assert 'href="index.html"' in found
    assert not (built / "repository" / "results" / "unlinked.html").exists()


@pytest.mark.parametrize("link", ["../results/gone.md", "gone.md", "#nowhere", "../results/a.md#nowhere"])
def test_a_link_that_leads_nowhere_is_a_warning(site, caplog, link):
    _, warnings = site({"docs/index.md": f"[a]({link})", "results/a.md": "# Top"}, caplog)
    assert any(re.search(r"contains a(n unrecognized)? (relative )?link", message) for message in warnings)


def test_a_page_may_hold_the_help_of_a_command(hooks):
    shown = hooks.on_page_markdown("<!-- mea env --help -->", None, None, None)
    assert shown.startswith("```text\nusage: mea env")
