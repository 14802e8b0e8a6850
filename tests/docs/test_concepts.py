"""The concept pages: each example prints what stands beneath it, and the pictures are drawn from what they speak of."""

import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch

from memory_efficient_attention_pytorch import Transformer, plan
from memory_efficient_attention_pytorch.planner import CATEGORIES
from tests.memory.live_bytes import LiveBytes

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text() for path in sorted((DOCS / "concepts").glob("*.md"))}
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_an_example_prints_what_stands_beneath_it(page, capsys):
    assert PAGES[page].count("```python") == 1
    ((code, shown),) = EXAMPLE.findall(PAGES[page])
    exec(compile(code, f"{page}.md", "exec"), {"__name__": page})
    assert capsys.readouterr().out == shown


@pytest.fixture(scope="module")
def pictures():
    pytest.importorskip("matplotlib", reason="the extra train")
    spec = importlib.util.spec_from_file_location("docs_pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_page_has_a_picture_that_can_be_drawn(pictures):
    drawn = dict(pictures.figures(tokens=1024, depth=2))
    assert sorted(drawn) == sorted(PAGES)
    for name, figure in drawn.items():
        assert PAGES[name].count(f"(../images/{name}.png)") == 1
        assert (DOCS / "images" / f"{name}.png").is_file()
        figure.savefig(io.BytesIO(), format="png")
        assert all(axes.has_data() for axes in figure.axes)


def test_the_picture_of_pieces_shows_that_eight_hold_a_quarter_of_one(pictures):
    whole, chunks = (pictures.activations(pictures.feed_forward_step(count, 1024)).max() for count in (1, 8))
    assert chunks < whole / 4


def test_the_picture_of_reversal_shows_that_the_grid_loses_nothing(pictures):
    assert pictures.rebuilt(depth=4, exact=True) == [1.0] * 4
    lossy = pictures.rebuilt(depth=4, exact=False)
    assert lossy == sorted(lossy, reverse=True)
    assert 0 < lossy[-1] < 1


def test_the_picture_of_planning_shows_four_times_a_tensor_of_tokens(pictures):
    made = pictures.step_of(8192)
    streams = made.breakdown["streams"] / (made.seq_len * 512 * 4)
    assert 4 <= streams < 4.3


@pytest.mark.parametrize("reversible", [True, False])
def test_a_plan_counts_the_tensors_of_the_real_step_to_the_byte(reversible):
    sizes = {"dim": 64, "depth": 2, "heads": 2, "dim_head": 32}
    config = {"num_tokens": 256, "max_seq_len": 1024, **sizes, "causal": True, "reversible": reversible}
    model, tokens = Transformer(**config), torch.randint(256, (2, 1, 1024))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as count:
        count.ignore([tokens, *model.parameters(), *(parameter.grad for parameter in model.parameters())])
        model(tokens[0], labels=tokens[1]).backward()
    timeline = plan(config, batch_size=1, seq_len=1024, device="cpu", optimizer=None, threads=1).timeline
    besides = ("parameters", "gradients", "kernel workspace", "allocator")
    columns = [i for i, name in enumerate(CATEGORIES) if name not in besides]
    assert timeline.live[:, columns].sum(axis=1).max() - tokens.nbytes == count.peak
