"""How the processes of a run share a step: a mesh of (data, context)."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor

from ..distributed import ContextParallel
from .config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class ProcessMesh:
    """``data`` groups of ``context_parallel`` processes each: a group has its own windows, and shares their tokens.

    Gradients are averaged over all processes, by DDP or FSDP2, so that of a group's loss counts once for each.
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
        """This process's tokens of its group's windows."""
        if self.context is None:
            return x, labels
        mine: tuple[Tensor, Tensor] = self.context.shard(x, labels)
        return mine

    def entered(self) -> AbstractContextManager[object]:
        """Inside, the model sees the whole windows, of which :meth:`own` gave this process's tokens."""
        return nullcontext() if self.context is None else self.context


def check_division(processes: int, config: TrainConfig) -> None:
    """Raise ValueError where so many processes cannot do what the configuration asks of them."""
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
