"""A sequence of reversible residual blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.compiled import eagerly
from ..common.errors import require
from ..recompute.by_hand import reason_against
from ..recompute.reversal import Chain, ChainEnd, Grid, OntoGrid, advance

Routes = Mapping[str, Sequence[tuple[bool, bool]]]


class ReversibleBlock(nn.Sequential):
    """One pair (f, g): ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``."""

    @property
    def f(self) -> nn.Module:
        return self[0]

    @property
    def g(self) -> nn.Module:
        return self[1]

    def forward(  # type: ignore[override]
        self, x1: Tensor, x2: Tensor, chain: Chain, *kwargs_of_each: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Map two streams to two streams, given the keywords of f and those of g."""
        if chain.rebuild:
            return eagerly(self._advance, x1, x2, chain, *kwargs_of_each)
        return self._advance(x1, x2, chain, *kwargs_of_each)

    def _advance(
        self, x1: Tensor, x2: Tensor, chain: Chain, *kwargs_of_each: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        streams = (x1, x2)
        chain.enter(*streams)
        chain.watched |= reason_against(self) is not None
        for module, kwargs in zip(self, kwargs_of_each, strict=True):
            streams = advance(module, chain, *streams, kwargs)
            chain.watch(streams[1])
        chain.leave(*streams)
        return streams


class ReversibleSequence(nn.Sequential):
    """Reversible blocks whose activation memory does not grow with their number.

    x is duplicated into two streams, each block adds ``f`` of the second to the first and ``g`` of the first to the
    second, and their sum comes out. Backward rebuilds each block's input from its output and recomputes f and g with
    the random state and autocast settings of the forward pass.

    Args:
        blocks: pairs (f, g) of modules that map ``(…, d)`` to the same shape.
        args_route: for each keyword of ``forward``, per block a pair of booleans: whether it goes to f, and to g.
            Tensors among the keywords (also nested in tuples, lists, dictionaries and dataclasses) and parameters of
            modules passed as keywords receive gradients.
        exact: streams in fp32 (at least) on a grid: the input and everything added to a stream is rounded to a multiple
            of ``grid``, with gradient 1. While every stream stays below ``2**24 · grid`` the rebuilt values equal the
            original ones bit for bit, whatever precision f and g compute in, provided they are deterministic. A stream
            that leaves this range is reported by a warning.
        grid: the step, a power of two.
        reversible: False stores activations instead, with the same arithmetic.

    Raises:
        ValueError: a keyword without a route, a route that does not cover every block, a grid that is no power of two.

    Works under ``eval()``, autocast, dropout, frozen inputs or parameters, several forwards before a backward,
    ``retain_graph``, ``torch.autograd.grad``, DDP, and FSDP2 applied to each block. Differentiable once.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import Attention, FeedForward, PreNorm, ReversibleSequence
        >>> def block():
        ...     attention = Attention(dim=64, heads=4, dim_head=16, causal=True)
        ...     return PreNorm(64, attention), PreNorm(64, FeedForward(64))
        >>> net = ReversibleSequence([block() for _ in range(12)], exact=True)
        >>> x = torch.randn(2, 100, 64, requires_grad=True)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     net(x).sum().backward()
        >>> x.grad.shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        blocks: Iterable[Iterable[nn.Module]],
        args_route: Routes | None = None,
        *,
        exact: bool = False,
        grid: float = 2**-16,
        reversible: bool = True,
    ) -> None:
        pairs = [tuple(block) for block in blocks]
        for i, pair in enumerate(pairs):
            require(len(pair) == 2, f"blocks[{i}]", "a pair of modules (f, g)", f"{len(pair)}")
        super().__init__(*(ReversibleBlock(*pair) for pair in pairs))
        self.args_route = dict(args_route or {})
        for keyword, routes in self.args_route.items():
            expected = f"a pair for each of {len(self)} blocks"
            require(len(routes) == len(self), f"args_route[{keyword!r}]", expected, len(routes))
        self.exact, self.reversible = exact, reversible
        self.grid = Grid(grid)
        self.register_load_state_dict_pre_hook(_rename_upstream_keys)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self)

    def __getitem__(self, index: Any) -> Any:
        """Return a block, or for a slice a sequence of some of the blocks, with their routes, that shares them."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        routes: dict[str, Any] = {keyword: list(routes)[index] for keyword, routes in self.args_route.items()}
        options: dict[str, Any] = {"exact": self.exact, "grid": self.grid.step, "reversible": self.reversible}
        part = ReversibleSequence([], {keyword: [] for keyword in routes}, **options)
        for number, block in enumerate(self.blocks[index]):
            part.add_module(str(number), block)
        part.args_route, part.training = routes, self.training
        return part

    def __delitem__(self, index: Any) -> None:
        super().__delitem__(index)
        for keyword, routes in self.args_route.items():
            left = list(routes)
            del left[index]
            self.args_route[keyword] = left

    def insert(self, *_: Any) -> Any:
        """Raise NotImplementedError: what a new block is given would not be known; build another sequence."""
        raise NotImplementedError("blocks cannot be added: build another ReversibleSequence of pairs, with its routes")

    append = extend = __add__ = __iadd__ = __mul__ = __rmul__ = __imul__ = insert  # type: ignore[assignment]

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Map x ``(…, d)`` to ``(…, d)``, in x's dtype."""
        if self.reverses:
            return eagerly(self._forward, x, **kwargs)
        return self._forward(x, **kwargs)

    def _forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        chain, y1, y2 = self.streams(x, **kwargs)
        if chain.rebuild:
            y1, y2 = ChainEnd.apply(chain, False, y1, y2), y2.detach()
        return (y1 + y2).to(x.dtype)

    @property
    def reverses(self) -> bool:
        """Whether backward will rebuild activations: gradients are on and ``reversible`` is not False."""
        return self.reversible and torch.is_grad_enabled()

    def streams(self, x: Tensor, **kwargs: Any) -> tuple[Chain, Tensor, Tensor]:
        """Return the chain and both streams ``(…, d)`` after the last block.

        Whatever consumes them goes through a :class:`ChainEnd`, whose backward begins the chain's. Raises ValueError
        for an unrouted keyword.
        """
        for keyword in kwargs:
            expected = f"a keyword of args_route ({', '.join(self.args_route)})"
            require(keyword in self.args_route, keyword, expected, "no route")
        chain = Chain(self.grid if self.exact else None, x.dtype, self.reverses, in_pieces=kwargs.get("cache") is None)
        stream = OntoGrid.apply(x, self.grid) if self.exact else x
        # Two nodes in the graph, so that gradients are summed in the same order whether activations are stored or not.
        streams = (stream.view_as(stream), stream.view_as(stream))
        for i, block in enumerate(self):
            routed = [{k: v for k, v in kwargs.items() if self.args_route[k][i][side]} for side in (0, 1)]
            streams = block(*streams, chain, *routed)
        chain.enter(*streams)
        chain.report(stream.dtype)
        return chain, *streams


def _rename_upstream_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept the keys ``blocks.{i}.f.net.…`` and ``blocks.{i}.g.net.…`` of memory_efficient_attention_pytorch 0.1."""
    take_over_keys(module, state_dict, prefix, prefix)


def take_over_keys(sequence: nn.Module, state_dict: dict[str, Any], source: str, prefix: str) -> None:
    """Rename keys under ``source`` that name the sequence's tensors, by old or new names; drop duplicates.

    prefix: the sequence's own. Other keys are kept, and reported as unexpected if they are.
    """
    known = {name for name, _ in (*sequence.named_parameters(), *sequence.named_buffers())}
    for key in [name for name in state_dict if name.startswith(source)]:
        name = _OF_UPSTREAM.sub(lambda found: f"{found[1]}.{'fg'.index(found[2])}.", key.removeprefix(source))
        if name in known and prefix + name != key:
            state_dict.setdefault(prefix + name, state_dict.pop(key))


_OF_UPSTREAM = re.compile(r"^blocks\.(\d+)\.([fg])\.net\.")
