"""The step to plan: of a Transformer given by keywords or built, or of any module with example inputs and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import require, require_positive_int
from ..distributed.exchange import Layout
from ..layers.cache import KVCache
from ..models.config import TransformerConfig
from ..models.transformer import Transformer
from ..torch_internals.hooks import children, forward_hooks, with_children
from .accounting import Accounting
from .step import OptimizerMaker, Step, dry_run
from .timeline import Timeline, at_depth

Config = Mapping[str, Any]
ExampleInputs = Any
"""A tensor, a tuple of positional or a mapping of keyword arguments, or a function of (batch_size, seq_len) that
returns one of these."""


@dataclass(frozen=True)
class Workload:
    """A step with a chosen batch size and sequence length."""

    subject: Config | nn.Module
    batch_size: int | None
    seq_len: int | None
    optimizer: str | OptimizerMaker | None = "adamw"
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    example_inputs: ExampleInputs = None
    loss_fn: Callable[[Any], Tensor] | None = None
    training: bool = True
    keep_gradients: bool = True
    shards: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        kinds = "a Transformer's keywords or an nn.Module"
        require(isinstance(self.subject, Mapping | nn.Module), "model_or_config", kinds, type(self.subject).__name__)
        for name in ("batch_size", "seq_len"):
            if self.of_transformer or getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        given = isinstance(self.subject, Mapping) and self.example_inputs is not None
        require(not given, "example_inputs", "None beside a Transformer's keywords", type(self.example_inputs).__name__)
        if not self.of_transformer:
            expected = "the inputs of this module's forward, or a function of (batch_size, seq_len) that makes them"
            require(self.example_inputs is not None, "example_inputs", expected, None)
        for name in ("shards", "context"):
            require_positive_int(name, getattr(self, name))
            fits = getattr(self, name) == 1 or (self.of_transformer and self.training)
            require(fits, name, "1 for all but a Transformer's training step", getattr(self, name))

    @property
    def of_transformer(self) -> bool:
        """Whether this is a Transformer's step on tokens, not one on example inputs."""
        return self.example_inputs is None and isinstance(self.subject, Mapping | Transformer)

    @property
    def token_shape(self) -> tuple[int, int]:
        """Batch size and length of a Transformer's tokens."""
        assert self.batch_size is not None
        assert self.seq_len is not None
        return self.batch_size, self.seq_len

    @property
    def most_tokens(self) -> int | None:
        """How many learned positions a Transformer has; None if its positions set no limit."""
        if isinstance(self.subject, Mapping):
            learned = self.subject.get("positions", TransformerConfig.positions) == "learned"
            most = self.subject.get("max_seq_len") if learned else None
        else:
            subject = self.subject
            most = subject.max_seq_len if isinstance(subject, Transformer) and subject.pos_emb is not None else None
        return most if most is None or self.training else most - 1

    def with_settings(self, settings: Mapping[str, Any]) -> Workload:
        """Return the same step of a Transformer with other keywords."""
        assert isinstance(self.subject, Mapping)
        return replace(self, subject={**self.subject, **settings})

    def run_dry(self, accounting: Accounting) -> Timeline:
        """Return the step's timeline; for equal blocks it is extended from those of 2 and 3 (sharded: 3 and 4)."""
        if not self.of_transformer:
            assert isinstance(self.subject, nn.Module)
            args, kwargs = self._arguments()
            return dry_run(self.step(self.subject, args, kwargs), accounting)
        batch, length = self.token_shape
        local = length if self.context == 1 else Layout(length, self.context).local
        tokens = torch.zeros(batch, local, dtype=torch.long, device="meta")

        def at(depth: int) -> Timeline:
            given = {"labels": tokens} if self.training else {"cache": KVCache()}
            return dry_run(self.step(self.transformer(depth), (tokens,), given), accounting)

        few = 2 if self.shards == 1 else 3  # a sharded block gathers its neighbour's parameters
        if self._depth > few + 1 and self._uniform:
            return at_depth(at(few), at(few + 1), self._depth - few)
        return at(self._depth)

    def step(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Step:
        loss = (self.loss_fn or _scalar_loss) if self.training else None
        then = (args[0][:, :1],) if self.of_transformer and not self.training else ()
        context = None if self.context == 1 else (self.token_shape[1], self.context)
        names = ("optimizer", "dtype", "autocast", "keep_gradients", "shards")
        return Step(model, loss, args, kwargs, then=then, context=context, **{n: getattr(self, n) for n in names})

    @property
    def _depth(self) -> int:
        if isinstance(self.subject, Mapping):
            depth = self.subject.get("depth")
            require_positive_int("depth", depth)
            return int(depth or 0)
        return len(self.subject.layers)  # type: ignore[arg-type]

    @property
    def _uniform(self) -> bool:
        if isinstance(self.subject, Mapping):
            return True
        first, *others = (_signature(block) for block in self.subject.layers)  # type: ignore[union-attr]
        return all(other == first for other in others)

    def transformer(self, depth: int) -> Transformer:
        if not isinstance(self.subject, Mapping):
            assert isinstance(self.subject, Transformer)
            return shortened(self.subject, depth)
        # As many learned positions as tokens, unless given; one more for the next token.
        keywords = {"max_seq_len": self.token_shape[1] + (not self.training), **self.subject, "depth": depth}
        try:
            with torch.device("meta"):
                return Transformer(**keywords)
        except TypeError as error:
            raise ValueError(f"model_or_config: {error}") from error

    def _arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        inputs = self.example_inputs
        if callable(inputs):
            for name in ("batch_size", "seq_len"):
                require(getattr(self, name) is not None, name, "a positive integer, for example_inputs", None)
            inputs = inputs(self.batch_size, self.seq_len)
        if isinstance(inputs, Mapping):
            return (), inputs
        return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def shortened(model: Transformer, depth: int) -> Transformer:
    """Return a Transformer of the first ``depth`` blocks, which shares the model's modules."""
    if depth == len(model.layers):
        return model
    layers = with_children(model.layers, dict(list(children(model.layers).items())[:depth]))
    layers.args_route = {keyword: list(routes)[:depth] for keyword, routes in model.layers.args_route.items()}
    short: Transformer = with_children(model, {**children(model), "layers": layers})
    return short


def _signature(block: nn.Module) -> list[Any]:
    """List what a block's memory depends on: modules' types, settings, hooks and own forwards, tensors' layouts."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        (
            name,
            type(module),
            {k: v for k, v in vars(module).items() if isinstance(v, plain)},
            [(k, p.shape, p.dtype, p.requires_grad) for k, p in module.named_parameters(recurse=False)],
            [(k, b.shape, b.dtype) for k, b in module.named_buffers(recurse=False)],
            [list(kind.values()) for kind in forward_hooks(module)],
            vars(module).get("forward"),
        )
        for name, module in block.named_modules()
    ]


def _scalar_loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError(
            "loss_fn: expected a function that turns the model's output into a scalar, since the output is no scalar "
            f"itself and has no scalar attribute 'loss', got None for an output of type {type(output).__name__}"
        )
    return loss
