"""Weights, gradients and the optimizer's averages divided among the processes: PyTorch's FSDP2, block by block."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..models.transformer import Transformer

if TYPE_CHECKING:
    from accelerate import Accelerator


def shard(model: Transformer, accelerator: "Accelerator") -> None:
    """Divide a model among all processes, each block gathered when its turn comes, the rest for each pass.

    A model on the meta device gets memory for this process's part, to be filled. Not with a scaler of gradients (fp16),
    which knows its own process only.
    """
    assert accelerator.scaler is None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    empty = any(parameter.is_meta for parameter in model.parameters())
    if not empty:
        model.to(accelerator.device)
    for part in (*model.layers, model):
        # Also what stands outside of the blocks lets go after a forward pass without a backward, such as a validation.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    if empty:
        model.to_empty(device=accelerator.device)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds a part of some parameters only."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may hold a part. Then every process has to ask for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
