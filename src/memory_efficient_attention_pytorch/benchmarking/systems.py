"""The systems compared: ours in its settings, and what a user would pick instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..common.errors import require
from .baselines import SdpaTransformer
from .packages import TRANSFORMERS, UPSTREAM, X_TRANSFORMERS, Package
from .shape import Shape

WINDOW = 1024
LOSS_CHUNK = 1024
FF_CHUNKS = 16
REFERENCE = "sdpa-checkpoint"  # what ratios are taken against

Loss = Callable[[Tensor, Tensor], Tensor]  # tokens, labels (b, n) → mean cross-entropy


@dataclass(frozen=True)
class System:
    """One way to train the shape: ``build(shape, packages)`` gives the model and its loss."""

    name: str
    label: str
    build: Callable[[Shape, Path], tuple[nn.Module, Loss]]
    ours: bool = False
    package: Package | None = None
    autocast: bool = False
    window: int | None = None


def find_systems(names: list[str] | None = None) -> list[System]:
    """The named systems in the order of the registry, all of them by default.

    Raises:
        ValueError: a name is not in the registry.
    """
    known = {system.name: system for system in SYSTEMS}
    for name in names or []:
        require(name in known, "systems", f"names among {', '.join(known)}", name)
    return [system for system in SYSTEMS if names is None or system.name in names]


def _lean(shape: Shape) -> dict[str, Any]:
    """Groups of two heads and a feed-forward in chunks: their working memory is a small part of the streams'."""
    return {"head_chunks": max(1, shape.heads // 2), "ff_chunks": FF_CHUNKS}


def _ours(lean: bool = False, **settings: Any) -> Callable[[Shape, Path], tuple[nn.Module, Loss]]:
    def build(shape: Shape, packages: Path) -> tuple[nn.Module, Loss]:
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


def _sdpa(**settings: Any) -> Callable[[Shape, Path], tuple[nn.Module, Loss]]:
    def build(shape: Shape, packages: Path) -> tuple[nn.Module, Loss]:
        model = SdpaTransformer(shape, **settings)
        return model, model

    return build


def _upstream(shape: Shape, packages: Path) -> tuple[nn.Module, Loss]:
    with UPSTREAM.imported(packages):
        from memory_efficient_attention_pytorch.models.transformer import Transformer

    model = Transformer(
        num_tokens=shape.num_tokens,
        max_seq_len=shape.seq_len,
        dim=shape.dim,
        depth=shape.depth,
        heads=shape.heads,
        dim_head=shape.dim_head,
        ff_mult=shape.ff_mult,
        causal=True,
    )
    return model, lambda tokens, labels: model(tokens, labels=labels)


def _x_transformers(shape: Shape, packages: Path) -> tuple[nn.Module, Loss]:
    with X_TRANSFORMERS.imported(packages) as x_transformers:
        layers = x_transformers.Decoder(
            dim=shape.dim,
            depth=shape.depth,
            heads=shape.heads,
            attn_dim_head=shape.dim_head,
            attn_flash=True,
            ff_mult=shape.ff_mult,
        )
        model = x_transformers.TransformerWrapper(
            num_tokens=shape.num_tokens, max_seq_len=shape.seq_len, attn_layers=layers
        )
    return model, lambda tokens, labels: F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


def _gpt2(shape: Shape, packages: Path) -> tuple[nn.Module, Loss]:
    with TRANSFORMERS.imported(packages) as transformers:
        config = transformers.GPT2Config(
            vocab_size=shape.num_tokens,
            n_positions=shape.seq_len,
            n_embd=shape.dim,
            n_layer=shape.depth,
            n_head=shape.heads,
            n_inner=shape.dim * shape.ff_mult,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
        model = transformers.GPT2LMHeadModel(config)
    # Renamed in transformers 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    # The model shifts labels itself: its loss is over all tokens but the last.
    return model, lambda tokens, labels: model(input_ids=tokens, labels=tokens).loss


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
    System("upstream", "memory-efficient-attention-pytorch 0.1.6", _upstream, package=UPSTREAM),
    System("x-transformers", "x-transformers, SDPA, everything stored", _x_transformers, package=X_TRANSFORMERS),
    System("gpt2", "Hugging Face GPT-2 + gradient checkpointing", _gpt2, package=TRANSFORMERS),
]
