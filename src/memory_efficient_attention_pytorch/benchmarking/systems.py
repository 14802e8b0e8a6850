"""The systems to compare: ours in several settings, and common alternatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..common.errors import require
from .baselines import SdpaTransformer
from .shape import Shape

WINDOW = 1024
LOSS_CHUNK = 1024
FF_CHUNKS = 16
REFERENCE = "sdpa-checkpoint"  # the denominator of ratios

Loss = Callable[[Tensor, Tensor], Tensor]  # tokens, labels (b, n) → mean cross-entropy
Build = Callable[[Shape], tuple[nn.Module, Loss]]


@dataclass(frozen=True)
class System:
    """One way to train a model of a shape: ``build(shape)`` returns the model and its loss.

    ``target`` prepares it by name in a fresh process, as ``step.build`` does; ``versions`` returns, by name, those of
    other packages that it needs. ``window``: attention's window in tokens, if it has one.
    """

    name: str
    label: str
    build: Build
    ours: bool = False
    autocast: bool = False
    window: int | None = None
    target: str = f"{__package__}.step:build"
    versions: Callable[[], dict[str, str]] = dict


def find_systems(names: Sequence[str] | None = None, among: Sequence[System] | None = None) -> list[System]:
    """Return the named systems, by default all, in their order in ``among`` (by default ours and PyTorch's own).

    Raises:
        ValueError: there is no system of that name.
    """
    among = SYSTEMS if among is None else among
    known = [system.name for system in among]
    for name in names or []:
        require(name in known, "systems", f"names among {', '.join(known)}", name)
    return [system for system in among if names is None or system.name in names]


def _lean(shape: Shape) -> dict[str, Any]:
    """Return groups of two heads (of one, if their number is odd) and a chunked feed-forward.

    Their working memory is small beside the streams'.
    """
    return {"head_chunks": shape.heads // (1 if shape.heads % 2 else 2), "ff_chunks": FF_CHUNKS}


def _ours(lean: bool = False, **settings: Any) -> Build:
    def build(shape: Shape) -> tuple[nn.Module, Loss]:
        from ..models.transformer import Transformer

        model = Transformer(
            num_tokens=shape.num_tokens,
            max_seq_len=shape.seq_len,
            dim=shape.dim,
            depth=shape.depth,
            heads=shape.heads,
            dim_head=shape.dim_head,
            ff_mult=shape.ff_mult,
            causal=True,
            **(_lean(shape) if lean else {}),
            **settings,
        )
        return model, lambda tokens, labels: model(tokens, labels=labels)

    return build


def _sdpa(**settings: Any) -> Build:
    def build(shape: Shape) -> tuple[nn.Module, Loss]:
        model = SdpaTransformer(shape, **settings)
        return model, model

    return build


SYSTEMS = [
    System("ours", "ours, default settings", _ours(), ours=True),
    System("ours-lean", "ours, lean", _ours(lean=True), ours=True),
    System("ours-window", f"ours, lean, window {WINDOW}", _ours(lean=True, window=WINDOW), ours=True, window=WINDOW),
    System(
        "ours-bf16", "ours, lean, exact under bf16 autocast", _ours(lean=True, exact=True), ours=True, autocast=True
    ),
    System("ours-stored", "ours, reversible=False (stores everything)", _ours(reversible=False), ours=True),
    System("ours-kept", "ours, lean, attention outputs kept", _ours(lean=True, keep_attention=True), ours=True),
    System("sdpa-stored", "SDPA, everything stored", _sdpa()),
    System("sdpa-checkpoint", "SDPA + checkpointing per layer", _sdpa(checkpoint_layers=True)),
    System(
        "sdpa-checkpoint-chunked",
        "SDPA + checkpointing + chunked loss",
        _sdpa(checkpoint_layers=True, loss_chunk_size=LOSS_CHUNK),
    ),
    System("sdpa-checkpoint-bf16", "SDPA + checkpointing, bf16 autocast", _sdpa(checkpoint_layers=True), autocast=True),
]
