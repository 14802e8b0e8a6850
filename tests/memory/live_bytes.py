"""Count what an operation really holds and does, exactly and repeatably: live storage bytes and operator calls."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("_linear_pointwise", "_convolution_pointwise_", "mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot")
FUSED = "scaled_dot_product"


class LiveBytes(TorchDispatchMode):
    """While active, tracks every storage that an operator returns, from its making to its freeing.

    `peak` and `live` are in bytes above what existed on entry; a storage's bytes count once however many tensors view
    it. `calls` counts operators by name without overload ("bmm", "add_"); `largest` is the biggest single storage made.
    Scratch memory inside a kernel, which no tensor ever holds, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.calls: Counter[str] = Counter()
        self._known: dict[int, weakref.finalize] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave these tensors' storages out of the count: they existed before."""
        for tensor in tensors:
            holder, key, _ = _memory(tensor)
            if key not in self._known:
                self._known[key] = weakref.finalize(holder, self._forget, key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.ignore(_tensors((args, tuple(kwargs.values()))))
        out = func(*args, **kwargs)
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in _tensors(out):
            self._made(*_memory(tensor))
        return out

    def _made(self, holder: object, key: int, size: int) -> None:
        if key in self._known:
            return
        self._known[key] = weakref.finalize(holder, self._forget, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size

    @property
    def products(self) -> int:
        """Matrix products called."""
        return sum(self.calls[name] for name in PRODUCTS)

    @property
    def fused(self) -> int:
        """Fused attention kernels called, forward or backward."""
        return sum(count for name, count in self.calls.items() if FUSED in name)


def _memory(tensor: torch.Tensor) -> tuple[object, int, int]:
    """What dies with a tensor's memory, its identity, and the bytes; oneDNN's packed tensors have no storage."""
    if tensor.layout is torch._mkldnn:
        return tensor, id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage, storage._cdata, storage.nbytes()


def _tensors(value) -> Iterator[torch.Tensor]:
    """The tensors in an operator's arguments or results, which nest in nothing but tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def saved_bytes(function, *args, **kwargs) -> int:
    """Bytes of distinct storages that autograd keeps for backward after `function(*args)`, parameters included."""
    storages: dict[int, int] = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function(*args, **kwargs)
    del kept
    return sum(storages.values())
