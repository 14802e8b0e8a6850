"""Divide the tokens of one sequence over several processes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..attention.request import AttentionRequest
from ..attention.tiles import Tiled
from ..attention.visibility import Mask
from ..attention.way import Way
from ..common.autograd import once_differentiable
from ..common.divided import within
from ..common.errors import require
from .all_to_all import AllToAll
from .exchange import Layout, together
from .ring import Ring, tokens_sent

METHODS = ("auto", "ring", "all_to_all")


class ContextParallel:
    """Divides the tokens of a sequence over the processes of a group; attention sees all of them.

    ::

        context = ContextParallel(mesh["context"])
        x, labels, mask = context.shard(x, labels, mask)
        with context:
            loss = model(x, labels=labels, mask=mask)
        loss.backward()
        context.reduce_gradients(model)

    Of 2p chunks, process r has numbers r and 2p − 1 − r, which balances the work under causality. Inside the ``with``
    block, attention's masks, windows, documents, biases and functions refer to the whole sequence: key padding
    ``(b, local)`` and document numbers are passed as :meth:`shard` returned them, other masks and bias tensors for the
    whole sequence. Backward may run outside the block for this package's layers, but not under
    ``torch.utils.checkpoint``. Compiled modules run eagerly inside; a compiled function may not enter the block itself.

    All processes must make the same calls in the same order. If one fails, the others wait until the group's timeout.

    Args:
        group: a process group, or a device mesh of one dimension.
        method: ``"ring"``: keys and values are passed around; ``"all_to_all"``: heads are exchanged for tokens, if head
            counts allow it; ``"auto"``: the exchange where it sends less and adds little memory, else the ring.
        averaged: gradients will be averaged over this group's processes, by DDP or FSDP on a mesh of (data, context):
            the loss's gradient is multiplied by their number here, and :meth:`reduce_gradients` is not called.

    Raises:
        ValueError: an invalid group or method; tokens that were not divided by :meth:`shard`.
        NotImplementedError: a backend asked for by name that does not compute tiles; heads that cannot be exchanged.

    Masks are gathered whole, ``b · n`` bytes. Cross-attention is not supported inside.

    Examples:
        With a group of one process; under ``torchrun`` use ``dist.init_process_group()`` and ``dist.group.WORLD``.

        >>> import torch
        >>> import torch.distributed as dist
        >>> from memory_efficient_attention_pytorch import Transformer
        >>> from memory_efficient_attention_pytorch.distributed import ContextParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = Transformer(num_tokens=256, max_seq_len=512, dim=64, depth=2, heads=4, dim_head=16, causal=True)
        >>> tokens = torch.randint(0, 256, (2, 513))
        >>> context = ContextParallel(dist.group.WORLD)
        >>> x, labels = context.shard(tokens[:, :-1], tokens[:, 1:])
        >>> with context:
        ...     loss = model(x, labels=labels)
        >>> loss.backward()
        >>> context.reduce_gradients(model)
        >>> dist.destroy_process_group()
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh, *, method: str = "auto", averaged: bool = False) -> None:
        if isinstance(group, DeviceMesh):
            require(group.ndim == 1, "group", "a mesh of one dimension", f"one of {group.ndim}")
            group = group.get_group()
        require(isinstance(group, dist.ProcessGroup), "group", "a process group or a mesh", type(group).__name__)
        require(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
        self.group, self.method, self.averaged = group, method, averaged
        self.rank, self.size = group.rank(), group.size()
        self._layout: Layout | None = None
        self._entered: list[ExitStack] = []

    def __enter__(self) -> ContextParallel:
        stack = ExitStack()
        # Collectives must run in the order of the calls; a compiler might reorder them.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(within(self))
        self._entered.append(stack)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().close()

    @property
    def layout(self) -> Layout:
        """The division of the sequence that was sharded last. Raises ValueError before :meth:`shard`."""
        if self._layout is None:
            raise ValueError("context: expected tokens divided by shard(), got none so far")
        return self._layout

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the whole sequence."""
        return self.layout.num_tokens

    @property
    def local_tokens(self) -> int:
        """Number of tokens of each process; up to ``2p − 1`` of all processes' tokens are padding."""
        return self.layout.local

    def shard(self, x: Tensor, labels: Tensor | None = None, *others: Mask | None, ignore_index: int = -100) -> Any:
        """Return this process's tokens of ``x (b, n, …)``, labels ``(b, n)`` and others: ``(b, local, …)``.

        Labels are shifted already. If ``2p`` does not divide n, the last chunks are padded with 0 or False, labels with
        ``ignore_index``; no token attends to the padding. Returns a tuple, or a tensor if only ``x`` is given; a mask
        that is a function, of indices in the whole sequence, is returned unchanged.

        Raises ValueError for tensors of other shapes.
        """
        given = (x, labels, *others)
        require(x.dim() > 1, "x", "shape (b, n, …)", tuple(x.shape))
        for number, tensor in enumerate(given):
            fits = not isinstance(tensor, Tensor) or tensor.shape[:2] == x.shape[:2]
            require(fits, f"tensor {number}", f"shape {tuple(x.shape[:2])} + (…)", getattr(tensor, "shape", None))
        self._layout = Layout(x.shape[1], self.size)
        fills = [ignore_index if number == 1 else 0 for number in range(len(given))]
        found = [self._own(t, fill) if isinstance(t, Tensor) else t for t, fill in zip(given, fills, strict=True)]
        return found[0] if labels is None and not others else tuple(found)

    def _own(self, x: Tensor, fill: int) -> Tensor:
        layout = self.layout
        own = x.new_full((x.shape[0], layout.local, *x.shape[2:]), fill)
        for chunk in layout.chunks(self.rank):
            own[:, layout.here(self.rank, chunk)] = x[:, chunk]
        return own

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the whole ``(b, n, …)``, in order, from every process's ``(b, local, …)``; without gradient.

        Raises ValueError for another number of tokens along ``dim``.
        """
        require(x.shape[dim] == self.layout.local, "x", f"{self.layout.local} tokens", x.shape[dim])
        own = x.detach().movedim(dim, 0).contiguous()
        bits = own.view(torch.uint8) if own.dtype == torch.bool else own
        parts = [torch.empty_like(bits) for _ in range(self.size)]
        together(dist.all_gather, parts, bits, group=self.group)
        whole = torch.cat(parts)[self.layout.places(x.device)]
        return whole.view(own.dtype).movedim(0, dim)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the positions of this process's tokens in the whole, int64 ``(local,)``; the last one for padding."""
        layout = self.layout
        numbers = layout.numbers(self.rank)
        found = [torch.arange(c * layout.chunk, (c + 1) * layout.chunk, device=device) for c in numbers]
        return torch.cat(found).clamp(max=layout.num_tokens - 1)

    def reduce_gradients(self, parameters: nn.Module | Iterable[Tensor]) -> None:
        """Sum the parameters' gradients in place over the group, which gives those of all tokens' loss."""
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        trained = [p for p in given if p.requires_grad]
        if not trained:
            return
        device = trained[0].device
        used = self._reduced(torch.tensor([p.grad is not None for p in trained], device=device).int())
        for parameter, some in zip(trained, used.tolist(), strict=True):
            if some:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                together(dist.all_reduce, parameter.grad, group=self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all processes, without gradient."""
        return self._reduced(x.detach())

    def largest(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over all processes, without gradient."""
        return self._reduced(x.detach(), dist.ReduceOp.MAX)

    def _reduced(self, x: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
        total = x.clone()
        together(dist.all_reduce, total, how, group=self.group)
        return total

    def same(self, number: int) -> int:
        """Return the first process's number."""
        told = [number]
        together(_broadcast, told, group=self.group)
        return told[0]

    def loss(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' parts of a loss; each process differentiates its own part."""
        total: Tensor = _Sum.apply(self, part)
        return total

    def may_hold(self, h: int, kv: int) -> bool:
        """Return whether attention can be computed for a group of ``h`` query and ``kv`` key/value heads."""
        return self.method != "all_to_all" or AllToAll.refusal(h, kv, self.size) is None

    def way(self, within: Tiled, request: AttentionRequest) -> Way:
        """Return how to compute attention over all tokens, given the way that computes tiles.

        Raises NotImplementedError if ``method="all_to_all"`` does not allow these heads.
        """
        refusal = AllToAll.refusal(request.h, request.kv, self.size)
        if self.method == "all_to_all" and refusal is not None:
            raise NotImplementedError(f"method: 'all_to_all' cannot compute this call: {refusal}; use 'ring' or 'auto'")
        kind: type[Ring] | type[AllToAll] = Ring
        if self.method == "all_to_all" or (
            self.method == "auto"
            and refusal is None
            and self._exchange_is_less(request)
            and AllToAll.adds_little(request, self.size)
        ):
            kind = AllToAll
        return kind(within, self.layout, self.group)

    def _exchange_is_less(self, request: AttentionRequest) -> bool:
        """Compare the elements that all send: all heads out and back once, or keys and values to whoever may see them.

        In forward; in backward both send as much again and gradients besides, in about the same proportion.
        """
        exchanged = (request.h + max(request.kv, self.size)) * (self.size - 1) * self.layout.local
        return exchanged < request.kv * tokens_sent(self.layout, (request.visibility.left, request.visibility.right))


def _broadcast(told: list[int], *, group: dist.ProcessGroup) -> None:
    dist.broadcast_object_list(told, group_src=0, group=group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: ContextParallel, part: Tensor) -> Tensor:
        ctx.factor = context.size if context.averaged else 1
        return context.sum(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, cotangent * ctx.factor
