"""Recompute under the conditions of the first pass: random state, autocast, division of tokens, kept results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from ..common.divided import active, within
from .kept import KeptResults


class Replay:
    """Records the conditions of a forward pass. Create it before, with gradients on if there will be a backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.cpu_state = torch.get_rng_state()
        self.devices, self.states = get_device_states(tensor)
        self.device_type = tensor.device.type
        kinds = {"cpu", self.device_type} - {"meta"}
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)
        }
        self._divided = active()
        self._kept = KeptResults() if torch.is_grad_enabled() else None

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Restore the recorded autocast settings, without autocast's weight cache, and the division of tokens.

        A weight cast under ``no_grad`` and then found in the cache by the repetition would get no gradient.
        """
        with ExitStack() as stack:
            stack.enter_context(within(self._divided))
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def first(self) -> Iterator[None]:
        """Run the forward pass inside the context."""
        with self._settings(), nullcontext() if self._kept is None else self._kept.keeping():
            yield

    def release(self) -> tuple[Tensor, ...]:
        """Return the tensors that :meth:`again` needs, and release them."""
        return () if self._kept is None else self._kept.release()

    @contextmanager
    def again(self, kept: Sequence[Tensor]) -> Iterator[None]:
        """Run the recomputation inside the context; the caller's random state is restored afterwards."""
        kind = self.device_type if self.devices else "cuda"
        results = nullcontext() if self._kept is None else self._kept.repeating(kept)
        with torch.random.fork_rng(self.devices, device_type=kind), self._settings(), results:
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.states, device_type=kind)
            yield
