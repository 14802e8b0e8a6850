"""Divide a step over the processes of a run: a mesh of (data, context)."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from ..distributed import ContextParallel
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class ProcessMesh:
    """Divides processes into ``data`` groups of ``context_parallel``: a group shares the tokens of its windows.

    Gradients are averaged over all processes, by DDP or FSDP2; :class:`ContextParallel` allows for that.
    """

    def __init__(self, accelerator: "Accelerator", config: TrainConfig) -> None:
        processes, size = accelerator.num_processes, config.context_parallel or 1
        self.data_size, self.data_rank = processes // size, accelerator.process_index // size
        self.context: ContextParallel | None = None
        if size > 1:
            from torch.distributed.device_mesh import init_device_mesh

            shape = (self.data_size, size)
            mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("data", "context"))
            self.context = ContextParallel(mesh["context"], averaged=True)

    def own(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return this process's tokens and labels of its group's windows, all ``(batch_size, …)``."""
        if self.context is None:
            return x, labels
        mine: tuple[Tensor, Tensor] = self.context.shard(x, labels)
        return mine

    def entered(self) -> AbstractContextManager[object]:
        """Return a context in which the model computes on whole windows, given this process's tokens by :meth:`own`."""
        return nullcontext() if self.context is None else self.context


def check_division(processes: int, config: TrainConfig) -> None:
    """Raise ValueError if this number of processes does not allow what the configuration asks for."""
    size = config.context_parallel or 1
    if processes == 1 and config.shard:
        raise ValueError("shard divides the model among processes and there is one: start several with torchrun")
    if processes == 1 and size > 1:
        raise ValueError(
            f"context_parallel divides each window's tokens among {size} processes and there is one: "
            f"start {size} or a multiple of it with torchrun"
        )
    if processes % size:
        raise ValueError(f"context_parallel must divide the number of processes, which is {processes}, got {size}")
