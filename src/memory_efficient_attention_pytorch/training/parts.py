"""Save and load sharded tensors by PyTorch's distributed checkpoints: any number of processes reads what others wrote.

The files are those of `torch.distributed.checkpoint.HuggingFaceStorageWriter` (safetensors, with each part's offsets in
the header), and are read by its reader; that writer itself would hold three copies of what it writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.futures import Future

from .files import WRITE_ERRORS, directory_written_atomically, flush, sha256

if TYPE_CHECKING:  # otherwise imported where used: they load all of FSDP
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.storage import WriteResult


def save_parts(path: Path, kinds: dict[str, dict[str, Tensor]], finish: Callable[[Path, dict[str, str]], None]) -> None:
    """Write a directory of `KIND-00001-of-00004.safetensors`, whole or not at all. A collective of all processes.

    kinds: tensors by kind and name, names being unique across kinds. Each process writes its part of a DTensor; one of
    them writes a plain tensor, which all have. finish: called in the first process when every part is on disk, with
    the directory and the SHA-256 sums of its files; then the directory gets its name.

    Raises in every process: OSError for one of WRITE_ERRORS in any of them, RuntimeError for other errors.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    kind_of = {name: kind for kind, tensors in kinds.items() for name in tensors}
    with contextlib.ExitStack() as stack:
        try:
            writer = _PartWriter(path, kind_of, finish, stack)
            save(
                {name: tensor for tensors in kinds.values() for name, tensor in tensors.items()}, storage_writer=writer
            )
        except CheckpointException as failure:
            rank, (error, _) = min(failure.failures.items())
            kind = OSError if isinstance(error, WRITE_ERRORS) else RuntimeError
            raise kind(f"process {rank}: {error}") from failure


def load_parts(files: Iterable[Path], tensors: dict[str, Tensor]) -> None:
    """Fill tensors, or this process's part of DTensors, from files that `save_parts` or `save_file` has written.

    A collective of all processes. Raises ValueError if names or shapes differ from those in the files.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _links_to(files) as folder:
        reader = HuggingFaceStorageReader(str(folder))
        known = {name: entry.size for name, entry in _entries(reader).items()}
        expected = {name: tensor.shape for name, tensor in tensors.items()}
        if known != expected:
            named = sorted(name for name in known.keys() | expected.keys() if known.get(name) != expected.get(name))
            raise ValueError(f"{named[0]} is {known.get(named[0])} in the files, expected {expected.get(named[0])}")
        with warnings.catch_warnings():
            # A single process needs no process group.
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            load(tensors, storage_reader=reader)


def shapes_in(files: Iterable[Path]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the whole shape and the dtype of each tensor in such files, by name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with _links_to(files) as folder:
        entries = _entries(HuggingFaceStorageReader(str(folder)))
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def _entries(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = reader.read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


@contextlib.contextmanager
def _links_to(files: Iterable[Path]) -> Iterator[Path]:
    """Yield a temporary directory of links to these files alone, since the reader takes every file in a directory."""
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            (Path(folder) / file.name).symlink_to(file.absolute())
        yield Path(folder)


class _PartWriter:
    """Implements `torch.distributed.checkpoint.StorageWriter` without the base class, to avoid importing it early.

    The first process makes the directory before any writes, and renames it when all have written.
    """

    def __init__(
        self,
        path: Path,
        kind_of: dict[str, str],
        finish: Callable[[Path, dict[str, str]], None],
        stack: contextlib.ExitStack,
    ):
        self.path, self.kind_of, self.finishing, self.stack = path, kind_of, finish, stack
        self.directory = path

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.directory = self.stack.enter_context(directory_written_atomically(self.path))
        names = [f"{number:05d}-of-{len(plans):05d}" for number in range(1, len(plans) + 1)]
        return [
            dataclasses.replace(plan, storage_data=(str(self.directory), name))
            for plan, name in zip(plans, names, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.storage import WriteResult

        directory, name = plan.storage_data
        written = []
        for kind in sorted(set(self.kind_of.values())):
            items = [item for item in plan.items if self.kind_of[item.index.fqn] == kind]
            items.sort(key=lambda item: item.index.fqn)  # PyTorch's order differs from run to run
            tensors, offsets = {}, {}
            for item in items:
                part: Any = planner.resolve_data(item)
                tensors[item.index.fqn] = part.detach().cpu().contiguous()
                assert item.tensor_data is not None
                offsets[item.index.fqn] = {"saved_offsets": item.tensor_data.chunk.offsets}
            file = Path(directory) / f"{kind}-{name}.safetensors"
            save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
            flush(file)
            written.append(WriteResult(MetadataIndex(file.name), file.stat().st_size, sha256(file)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.finishing(self.directory, {each.index.fqn: each.storage_data for parts in results for each in parts})
        self.stack.close()

    def storage_meta(self) -> None:
        pass
