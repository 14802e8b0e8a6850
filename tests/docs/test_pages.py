"""The code of a page runs as it is written, block after block, and prints what the page says it prints."""

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import torch

from memory_efficient_attention_pytorch.common import products

DOCS = Path(__file__).parents[2] / "docs"
MIGRATION = [f"migrate/from-{name}.md" for name in ("0.1", "sdpa", "flash-attn", "flex-attention")]
PAGES = ("masks.md", "extending.md", *MIGRATION)
PLANS = [pytest.param(page, marks=pytest.mark.slow) for page in ("planner.md", "choose-settings.md")]
# A block of code and, where one without a language follows at once, the output that it stands for.
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n?^```\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(monkeypatch):
    """A function that runs the blocks of a page one after another, in one module, and returns how many there were."""

    def run(text: str, page: str) -> int:
        module = ModuleType("page")
        monkeypatch.setitem(sys.modules, "page", module)  # PyTorch's compiler imports a function's module
        blocks = list(BLOCK.finditer(text))
        assert len(blocks) == text.count("```python\n"), "a block was not understood"
        for block in blocks:
            printed = io.StringIO()
            before = text.count("\n", 0, block.start("code"))  # so that errors name the page's own lines
            with redirect_stdout(printed):
                exec(compile("\n" * before + block["code"], page, "exec"), vars(module))
            expected = block["output"] or ""
            assert printed.getvalue() == expected, f"{page}, line {before + 1}: it prints something else"
        return len(blocks)

    return run


@pytest.mark.parametrize("page", [*PAGES, *PLANS])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_page_runs_as_it_is_written(page, run):
    assert run((DOCS / page).read_text(), page)


@pytest.mark.slow
def test_the_readme_prints_what_it_says(run, monkeypatch):
    """Its first lines: two plans, two searches, and a step of 8192 tokens, on a processor like the one it names."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    first = (DOCS.parent / "README.md").read_text().partition("\n## ")[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert run(first, "README.md") == 1
    finally:
        torch.set_num_threads(threads)


def test_what_a_page_prints_is_compared(run):
    page = "```python\nx = 1\n```\n\ntext\n\n```python\nprint(x + 1)\n```\n"
    assert run(page + "\n```\n2\n```\n", "a page") == 2
    for wrong in ("", "\n```\n3\n```\n", "\ntext\n\n```\n2\n```\n"):
        with pytest.raises(AssertionError, match="a page, line 8: it prints something else"):
            run(page + wrong, "a page")
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```\n", "a page")
