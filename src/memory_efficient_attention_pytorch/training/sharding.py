"""Shard weights, gradients and optimizer state over the processes by PyTorch's FSDP2, block by block."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..models.transformer import Transformer

if TYPE_CHECKING:
    from accelerate import Accelerator


def shard(model: Transformer, accelerator: "Accelerator") -> None:
    """Shard a model over all processes; each block is gathered when it is needed, the rest for each pass.

    A model on the meta device gets uninitialised memory for this process's shards. Does not work with an fp16 gradient
    scaler, which sees only its own process.
    """
    assert accelerator.scaler is None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    empty = any(parameter.is_meta for parameter in model.parameters())
    if not empty:
        model.to(accelerator.device)
    for part in (*model.layers, model):
        # Reshard parameters outside the blocks too, after a forward pass without a backward such as a validation.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    if empty:
        model.to_empty(device=accelerator.device)


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds only a part of some parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; a collective of all processes if this one holds a part of it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
