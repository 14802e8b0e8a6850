"""Weights, gradients and the optimizer's averages divided among the processes: PyTorch's FSDP2, block by block."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..models.transformer import Transformer

if TYPE_CHECKING:
    from accelerate import Accelerator


def shard(model: Transformer, accelerator: "Accelerator") -> None:
    """Divide a model among all processes, each block gathered when its turn comes, the rest for each pass.

    Not with a scaler of gradients (fp16), which knows its own process only.
    """
    assert accelerator.scaler is None
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    model.to(accelerator.device)
    for part in (*model.layers, model):
        # Also what stands outside of the blocks lets go after a forward pass without a backward, such as a validation.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds a part of some parameters only."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may hold a part. Then every process has to ask for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def parted(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that all have, divided as ``like`` is, if it is and their shapes agree."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gathered(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All of them whole, one after another, in host memory; only their gathering is shared in where not kept."""
    found = {}
    for name, tensor in tensors.items():
        entire = whole(tensor)
        if keep:
            found[name] = entire.detach().to("cpu" if entire is not tensor else entire.device).contiguous()
    return found
