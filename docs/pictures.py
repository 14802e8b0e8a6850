"""Draw the pictures of the concept pages into docs/images: python docs/pictures.py [FOLDER]

Every number in them is the library's own: its cut into tiles, its dry run's count of live bytes, its reversible blocks.
Without a background, in colours between light and dark, so that they are readable on either.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import nn

from memory_efficient_attention_pytorch import Attention, FeedForward, PreNorm, ReversibleSequence, plan
from memory_efficient_attention_pytorch.attention.visibility import Row, Visibility
from memory_efficient_attention_pytorch.benchmarking.baselines import SdpaTransformer
from memory_efficient_attention_pytorch.benchmarking.shape import Shape
from memory_efficient_attention_pytorch.cli.plan_picture import picture
from memory_efficient_attention_pytorch.planner import CATEGORIES, Plan, Timeline
from memory_efficient_attention_pytorch.planner.accounting import accounting_for
from memory_efficient_attention_pytorch.planner.step import Step, dry_run

IMAGES = Path(__file__).parent / "images"
MIB = 2**20
# Of a luminance that is as far from a white page as from a dark one.
INK = "#7d8085"
BLUE, PALE, ORANGE, GREEN = "#4a7fe0", "#9db9ec", "#d9822b", "#3d9a57"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
CUDA = torch.device("cuda")
"""What is planned for a CUDA device, present or not, is the same on every machine."""
BESIDES = ("parameters", "gradients", "kernel workspace", "allocator")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=IMAGES)
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, figure in figures():
            figure.savefig(folder / f"{name}.png", dpi=200, transparent=True, metadata={"Software": None})


def figures(tokens: int = 8192, depth: int = 32) -> Iterator[tuple[str, Figure]]:
    """Each picture by its name."""
    yield "tiles", tiles(tokens)
    yield "pieces", pieces(tokens)
    yield "reversal", reversal(tokens, depth)
    yield "planning", picture(step_of(tokens), size=(8.2, 3.8))


def tiles(tokens: int) -> Figure:
    """The tiles of three kinds of visibility, at the sides that attention has by default."""
    documents = (torch.arange(tokens) >= torch.tensor([[5 * tokens // 16], [11 * tokens // 16]])).sum(0)[None]
    kinds = {
        "causal": {},
        f"causal, window of {tokens // 4}": {"window": (tokens // 4, 0)},
        "causal, three documents": {"document_ids": documents},
    }
    figure, panels = _panels(3, height=3.5, sharey=True)
    for axes, (name, given) in zip(panels, kinds.items(), strict=True):
        visibility = Visibility.build((1, 1, tokens, tokens), torch.device("cpu"), causal=True, **given)
        _draw_tiles(axes, visibility.schedule(512, 1024, torch.device("cpu")), tokens)
        axes.set_title(f"{name}\n{axes.get_title()}")
    panels[0].set_ylabel("queries")
    shown = {"full: no mask": BLUE, "partial: masked": PALE, "empty: not computed": "none"}
    handles = [Patch(facecolor=colour, edgecolor=INK, label=name) for name, colour in shown.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_tiles(axes: Any, rows: list[Row], tokens: int) -> None:
    found = [tile for row in rows for tile in row.tiles]
    for tile in found:
        corner, size = (tile.j0, tile.i0), (tile.j1 - tile.j0, tile.i1 - tile.i0)
        axes.add_patch(Rectangle(corner, *size, facecolor=BLUE if tile.full else PALE, edgecolor=INK, linewidth=0.6))
    share = sum(tile.scores for tile in found) / tokens**2
    axes.set_title(f"{share:.0%} of n × m computed")
    axes.set(xlim=(0, tokens), ylim=(tokens, 0), aspect="equal", xlabel="keys")
    axes.set_xticks([0, tokens // 2, tokens])
    axes.set_yticks([0, tokens // 2, tokens])


def pieces(tokens: int) -> Figure:
    """What is live through forward and backward of a feed-forward, as a whole and in pieces."""
    figure, panels = _panels(2, height=3.1, sharey=True)
    for axes, chunks in zip(panels, (1, 8), strict=True):
        timeline = feed_forward_step(chunks, tokens)
        live = activations(timeline) / MIB
        axes.fill_between(range(len(live)), live, color=BLUE, linewidth=0)
        first = next(i for i, operation in enumerate(timeline.operations) if operation.phase == "backward")
        axes.axvline(first, color=INK, linewidth=0.8, linestyle="--")
        axes.annotate(" backward", (first, 0.97), xycoords=("data", "axes fraction"), va="top")
        axes.set_title(f"{_counted(chunks, 'chunk')}: {live.max():.0f} MiB at the peak")
        axes.set(xlim=(0, len(live) - 1), xlabel="operations, in order")
        _open(axes)
    panels[0].set_ylabel("live bytes, MiB")
    panels[0].set_ylim(0, 1.2 * panels[0].get_ylim()[1])
    return figure


def feed_forward_step(chunks: int, tokens: int, dim: int = 512) -> Timeline:
    """A feed-forward, forward and backward, run dry with every one of its chunks."""
    x = torch.zeros(1, tokens, dim, device="meta", requires_grad=True)
    with torch.device("meta"):
        module = FeedForward(dim, chunks=chunks)
    step = Step(module, lambda out: out.sum(), (x,), optimizer=None)
    return dry_run(step, accounting_for(CUDA), every_part=True)


def activations(timeline: Timeline) -> np.ndarray:
    """Live bytes without weights, their gradients, and what is no tensor."""
    return timeline.live[:, [i for i, name in enumerate(CATEGORIES) if name not in BESIDES]].sum(axis=1)


def reversal(tokens: int, depth: int) -> Figure:
    """Memory by depth, and how much of a stream comes back as it was."""
    figure, (memory, exactness) = _panels(2, height=3.5)
    depths = [d for d in (1, 2, 4, 8, 16, 24, 32) if d <= depth]
    for name, colour in (("stored", ORANGE), ("checkpointed", GREEN), ("reversible", BLUE)):
        values = [activations(step_at(name, d, tokens).timeline).max() / 2**30 for d in depths]
        memory.plot(depths, values, color=colour, marker="o", markersize=4, linewidth=2, label=name)
    memory.set(xlabel="blocks", ylabel="live bytes at the peak, GiB", title="memory by depth")
    memory.set(xlim=(0, None), ylim=(0, None))
    for name, exact, colour in (("rounded as usual", False, ORANGE), ("on the grid", True, BLUE)):
        same = [100 * fraction for fraction in rebuilt(depth, exact)]
        exactness.plot(range(1, len(same) + 1), same, color=colour, linewidth=2, label=name)
    exactness.set(
        xlabel="blocks walked back", ylabel="elements as they were, %", title="a stream rebuilt, branches in bf16"
    )
    exactness.set(xlim=(0, None), ylim=(0, 105))
    for axes in (memory, exactness):
        _open(axes)
        axes.legend(frameon=False, loc="lower left" if axes is exactness else "upper left")
    return figure


def step_at(how: str, depth: int, tokens: int) -> Plan:
    """Forward and backward of a causal language model in fp32, for one sequence."""
    shape = Shape(seq_len=tokens, depth=depth)
    if how == "reversible":
        config = {
            "num_tokens": shape.num_tokens,
            "dim": shape.dim,
            "depth": depth,
            "heads": shape.heads,
            "causal": True,
        }
        return plan({**config, "causal": True}, batch_size=1, seq_len=tokens, optimizer=None, device=CUDA)
    with torch.device("meta"):
        model = SdpaTransformer(shape, checkpoint_layers=how == "checkpointed")
        inputs = torch.zeros(1, tokens, dtype=torch.long), torch.zeros(1, tokens, dtype=torch.long)
    return plan(model, example_inputs=inputs, optimizer=None, device=CUDA)


def rebuilt(depth: int, exact: bool, dim: int = 64, tokens: int = 64) -> list[float]:
    """Which part of a stream's elements backward rebuilds bit for bit, after one block, after two, and so on."""
    torch.manual_seed(0)
    seen: list[torch.Tensor] = []

    class Watched(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.clone())
            return self.module(x)

    blocks = [
        (Watched(PreNorm(dim, Attention(dim=dim, heads=4, dim_head=16, causal=True))), PreNorm(dim, FeedForward(dim)))
        for _ in range(depth)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        out = ReversibleSequence(blocks, exact=exact)(torch.randn(4, tokens, dim, requires_grad=True))
    out.square().mean().backward()
    # A block's f sees the second stream on its way in: once in forward, and once as backward has rebuilt it.
    before, after = seen[:depth][::-1], seen[depth:]
    return [(was == now).double().mean().item() for was, now in zip(before, after, strict=True)]


def step_of(tokens: int) -> Plan:
    """The step whose timeline is shown."""
    config = {"num_tokens": 256, "dim": 512, "depth": 4, "causal": True, "positions": "rotary"}
    return plan(config, batch_size=1, seq_len=8 * tokens, device=CUDA)


def _panels(count: int, height: float, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.2, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    return figure, figure.subplots(1, count, **options)


def _open(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    main()
