"""One of two processes with compiled modules: `python -m tests.distributed.compiled_processes RANK DIRECTORY`.

Every case takes a step at each of LENGTHS; losses, summed gradients and the number of graphs compiled so far go to
DIRECTORY/RANK.safetensors.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from memory_efficient_attention_pytorch import Transformer
from memory_efficient_attention_pytorch.distributed import ContextParallel
from tests.compiled import Counted
from tests.processes import join, leave

WORLD, LENGTHS = 2, (23, 31, 17)
CASES: dict[str, dict[str, Any]] = {
    "divided": {"positions": "rotary", "window": 6},
    "divided stored": {"positions": "alibi", "reversible": False},
    "sharded": {"positions": "rotary", "dropout": 0.2},
    "sharded stored": {"reversible": False},
    "transformers divided": {},
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    if case.startswith("transformers"):
        from tests.huggingface.models import small_model

        return small_model("Llama", torch.float32)
    widths = {"num_tokens": 64, "max_seq_len": 64, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "ff_mult": 2}
    return Transformer(**widths, causal=True, **CASES[case])


def batch(length: int) -> tuple[Tensor, Tensor]:
    """Tokens and their labels, moved by one."""
    tokens = torch.arange(2 * length).view(2, length) * 7 % 61
    return tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)


def loss_of(model: nn.Module, case: str, length: int) -> Tensor:
    """Of all tokens, in one process."""
    torch.manual_seed(length)
    tokens, labels = batch(length)
    if case.startswith("transformers"):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return model(tokens, labels=labels)


def divided(model: nn.Module, compiled: nn.Module, case: str, length: int) -> Tensor:
    """The same of tokens divided over the processes."""
    context = ContextParallel(dist.group.WORLD)
    tokens, labels = batch(length)
    theirs = case.startswith("transformers")
    x, labels = context.shard(tokens, tokens if theirs else labels)
    with context:
        loss = compiled(input_ids=x, labels=labels).loss if theirs else compiled(x, labels=labels)
    loss.backward()
    context.reduce_gradients(model)
    return loss


def sharded(model: nn.Module, backend: Counted) -> nn.Module:
    """Each block compiled and its parameters sharded, as FSDP's documentation has it."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for block in model.layers:
        block.compile(backend=backend)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(case: str) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model, backend, found = build(case), Counted(), {}
    if case.startswith("transformers"):
        from memory_efficient_attention_pytorch.huggingface import make_memory_efficient

        make_memory_efficient(model)
    compiled = sharded(model, backend) if case.startswith("sharded") else torch.compile(model, backend=backend)
    for length in LENGTHS:
        model.zero_grad()
        if case.startswith("sharded"):
            loss = loss_of(compiled, case, length)
            loss.backward()
        else:
            loss = divided(model, compiled, case, length)
        found[f"{length}.loss"] = loss.detach().reshape(1)
        found[f"{length}.graphs"] = torch.tensor([backend.graphs])
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{length}.{name}"] = getattr(parameter.grad, "full_tensor", parameter.grad.clone)()
    return found


def main() -> None:
    rank, directory, *cases = int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    join(rank, WORLD, directory)
    found = {f"{case}/{name}": tensor for case in cases for name, tensor in train(case).items()}
    save_file(found, directory / f"{rank}.safetensors")
    leave()


if __name__ == "__main__":
    main()
