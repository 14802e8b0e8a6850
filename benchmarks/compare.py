"""``mea bench`` with other projects beside ours: version 0.1 of this package, x-transformers and Hugging Face's GPT-2.

    python benchmarks/compare.py [--install] [the options of mea bench]

--install brings what is missing with pip, into benchmarks/packages/ what would be in the environment's way.
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn import functional as F

from memory_efficient_attention_pytorch.benchmarking.shape import Shape
from memory_efficient_attention_pytorch.benchmarking.step import prepare
from memory_efficient_attention_pytorch.benchmarking.systems import SYSTEMS, Loss, System, find_systems
from memory_efficient_attention_pytorch.cli import bench

PACKAGES = Path(__file__).resolve().parent / "packages"
OURS = "memory_efficient_attention_pytorch"


@dataclass(frozen=True)
class Package:
    """Another project's distribution, the module it is imported as, and what pip installs for it."""

    distribution: str
    module: str
    requirements: tuple[str, ...]
    apart: bool = True

    @property
    def has_our_name(self) -> bool:
        return self.module.partition(".")[0] == OURS

    @property
    def folder(self) -> Path:
        return PACKAGES / self.distribution

    def versions(self) -> dict[str, str]:
        """Its name and version, from its own folder or the environment (which, under our name, has ours)."""
        environment = [] if self.has_our_name else sys.path
        found = metadata.distributions(name=self.distribution, path=[str(self.folder), *environment])
        return dict([(self.distribution, one.version) for one in found][:1])

    def pip_arguments(self) -> list[str]:
        # Without dependencies: a second PyTorch beside the environment's must not come along.
        where = ["--no-deps", "--target", str(self.folder)] if self.apart else []
        return ["install", *where, *self.requirements]

    @contextmanager
    def imported(self) -> Iterator[ModuleType]:
        """Import it, from its own folder first, and keep it importable for the rest of this process.

        Under our name it stands in for ours only while the block runs, so that the imports it makes of itself find
        itself; its objects stay usable afterwards.
        """
        ours = _take_modules() if self.has_our_name else {}
        sys.path.insert(0, str(self.folder))
        try:
            yield importlib.import_module(self.module)
        finally:
            if self.has_our_name:
                sys.path.remove(str(self.folder))
                _take_modules()
                sys.modules.update(ours)


def _take_modules() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == OURS}


UPSTREAM = Package(
    OURS.replace("_", "-"), f"{OURS}.transformer", ("memory-efficient-attention-pytorch==0.1.6", "einops")
)
X_TRANSFORMERS = Package(
    "x-transformers",
    "x_transformers",
    ("x-transformers", "einops", "einx", "frozendict", "loguru", "torch-einops-utils"),
)
TRANSFORMERS = Package("transformers", "transformers", ("transformers",), apart=False)


def upstream(shape: Shape) -> tuple[nn.Module, Loss]:
    with UPSTREAM.imported() as package:
        model = package.Transformer(
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


def x_transformers(shape: Shape) -> tuple[nn.Module, Loss]:
    with X_TRANSFORMERS.imported() as package:
        layers = package.Decoder(
            dim=shape.dim,
            depth=shape.depth,
            heads=shape.heads,
            attn_dim_head=shape.dim_head,
            attn_flash=True,
            ff_mult=shape.ff_mult,
        )
        model = package.TransformerWrapper(num_tokens=shape.num_tokens, max_seq_len=shape.seq_len, attn_layers=layers)
    return model, lambda tokens, labels: F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


def gpt2(shape: Shape) -> tuple[nn.Module, Loss]:
    with TRANSFORMERS.imported() as package:
        config = package.GPT2Config(
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
        model = package.GPT2LMHeadModel(config)
    # Renamed in transformers 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    # The model shifts labels itself: its loss is over all tokens but the last.
    return model, lambda tokens, labels: model(input_ids=tokens, labels=tokens).loss


PROJECTS = {
    "upstream": ("memory-efficient-attention-pytorch 0.1.6", upstream, UPSTREAM),
    "x-transformers": ("x-transformers, SDPA, everything stored", x_transformers, X_TRANSFORMERS),
    "gpt2": ("Hugging Face GPT-2 + gradient checkpointing", gpt2, TRANSFORMERS),
}
OTHERS = [
    System(name, label, make, target=f"{Path(__file__).resolve()}:build", versions=package.versions)
    for name, (label, make, package) in PROJECTS.items()
]


def build(system: str, **how: Any) -> Callable[[], None]:
    """One of the others, prepared in its own process; a target of ``measure_peak``."""
    return prepare(find_systems([system], OTHERS)[0], **how)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="install what is missing")
    bench.add_arguments(parser)
    args = parser.parse_args(arguments)
    systems = find_systems(args.systems, [*SYSTEMS, *OTHERS])
    for system in systems:
        if system.name in PROJECTS and not system.versions():
            command = PROJECTS[system.name][2].pip_arguments()
            if args.install:
                subprocess.run([sys.executable, "-m", "pip", *command], check=True)
            elif not args.list:
                parser.error(f"--systems: {system.name} is not installed; with --install: pip {' '.join(command)}")
    return bench.measure(args, systems)


if __name__ == "__main__":
    sys.exit(main())
