"""The chunks of a sequence that each process has, and the exchange of tensors between processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from ..common import dry_run


def together(collective: Callable[..., Any], *arguments: Any, group: dist.ProcessGroup) -> Any:
    """Run a collective of torch.distributed. In a dry run, which has no peers, only record it and return None."""
    watching = dry_run.current()
    return (
        collective(*arguments, group=group) if watching is None else watching.exchanges(collective.__name__, arguments)
    )


_met: WeakSet[dist.ProcessGroup] = WeakSet()
"""Groups whose processes have all taken part in a collective."""


def meet(group: dist.ProcessGroup, device: torch.device) -> None:
    """Have all of a group take part in a collective, once, before any :class:`Transfer`.

    A process of which no other sees a token, and that sees none, takes part in no transfer, and the documentation of
    torch.distributed.batch_isend_irecv says: if it is a group's first collective, "all ranks of the group must
    participate in this API call; otherwise, the behavior is undefined". After another collective some are enough.
    """
    if group not in _met:
        together(dist.all_reduce, torch.zeros(1, device=device), group=group)
        _met.add(group)


class Layout(NamedTuple):
    """Divides a sequence into ``2 · size`` chunks; process r has numbers r and ``2 · size − 1 − r``.

    Under causality each such pair of an early and a late chunk has the same work.
    """

    num_tokens: int
    size: int

    @property
    def chunk(self) -> int:
        """Tokens per chunk, padding included."""
        return -(-self.num_tokens // (2 * self.size))

    @property
    def local(self) -> int:
        """Tokens per process, padding included."""
        return 2 * self.chunk

    def numbers(self, rank: int) -> tuple[int, int]:
        """Return the numbers of a process's two chunks."""
        return rank, 2 * self.size - 1 - rank

    def chunks(self, rank: int) -> list[slice]:
        """Return the places of a process's chunks in the whole, without padding; one of padding alone is left out."""
        starts = [number * self.chunk for number in self.numbers(rank)]
        return [slice(start, min(start + self.chunk, self.num_tokens)) for start in starts if start < self.num_tokens]

    def here(self, rank: int, part: slice) -> slice:
        """Return the index, in a process's own tensors, of a part of one of its chunks."""
        first, second = (number * self.chunk for number in self.numbers(rank))
        shift = first if part.start < first + self.chunk else second - self.chunk
        return slice(part.start - shift, part.stop - shift)

    def places(self, device: torch.device) -> Tensor:
        """Return the index of each token, int64 ``(num_tokens,)``, in the concatenation of all processes' tensors."""
        order = [number for rank in range(self.size) for number in self.numbers(rank)]
        where = torch.tensor(order, device=device).argsort()
        tokens = where[:, None] * self.chunk + torch.arange(self.chunk, device=device)
        return tokens.flatten()[: self.num_tokens]


class Transfer:
    """Sends tensors to one process while receiving others from another; all have ``like``'s dtype and device."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        to: int,
        sent: Sequence[Tensor],
        source: int,
        shapes: Sequence[torch.Size],
        *,
        like: Tensor,
    ) -> None:
        self.shapes = shapes
        self._sent = torch.cat([like.new_empty(0), *(t.reshape(-1) for t in sent)])
        self._found = like.new_empty(sum(shape.numel() for shape in shapes))
        self._works = together(_send_and_receive, self._sent, to, self._found, source, group=group) or []

    def wait(self) -> list[Tensor]:
        """Wait for the transfer and return the received tensors."""
        for work in self._works:
            work.wait()
        del self._sent
        parts = self._found.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _send_and_receive(
    sent: Tensor, to: int, found: Tensor, source: int, *, group: dist.ProcessGroup
) -> list[dist.Work]:
    steps: list[tuple[Callable[..., object], Tensor, int]] = [(dist.isend, sent, to), (dist.irecv, found, source)]
    of_all = (dist.get_global_rank(group, rank) for _, _, rank in steps)
    operations = [dist.P2POp(how, t, peer, group) for (how, t, _), peer in zip(steps, of_all, strict=True) if t.numel()]
    return dist.batch_isend_irecv(operations) if operations else []


def all_to_all(group: dist.ProcessGroup, sent: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Send one tensor to each process and return those received from each; all have one shape, or come stacked."""
    stacked = sent if isinstance(sent, Tensor) else torch.stack(list(sent))
    found = torch.empty_like(stacked)
    together(dist.all_to_all_single, found, stacked, group=group)
    return list(found)
