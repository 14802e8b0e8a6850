"""One of two processes that train a model made long over gloo.

Run as `python -m tests.huggingface.two_processes RANK DIRECTORY`.

Each case of CASES takes one backward pass, each rank with a sequence of its own; the gradients, averaged over both, go
to DIRECTORY/CASE-RANK.safetensors; of a Trainer, the weights after two steps of SGD.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from memory_efficient_attention_pytorch.huggingface import feed_forward, make_memory_efficient
from tests.huggingface.models import small_model, tokens
from tests.processes import join, leave

WORLD = 2
CASES = ("ddp", "ddp adapters", "fsdp2", "accelerate", "trainer")


def build(case: str) -> nn.Module:
    model: nn.Module = small_model("Llama", torch.float32 if case == "trainer" else torch.float64)
    if case == "ddp adapters":
        import peft

        torch.manual_seed(3)
        options = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).double()
    return model


def distribute(case: str, model: nn.Module) -> nn.Module:
    if case == "fsdp2":
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if case == "accelerate":
        from accelerate import Accelerator

        prepared: nn.Module = Accelerator(cpu=True).prepare(model)
        assert isinstance(prepared, DistributedDataParallel)
        return prepared
    return DistributedDataParallel(model)


def trained(model: nn.Module, directory: Path, batch: int, accumulation: int) -> None:
    """Two steps over the same eight sequences, however many processes share them."""
    from transformers import Trainer, TrainingArguments

    ids = tokens(batch=8, length=12)
    data = [{"input_ids": row, "labels": row.masked_fill(row < 3 + 4 * i, -100)} for i, row in enumerate(ids)]
    arguments = TrainingArguments(
        output_dir=str(directory), max_steps=2, per_device_train_batch_size=batch, learning_rate=1e-2,
        gradient_accumulation_steps=accumulation, max_grad_norm=0, report_to=[], use_cpu=True, save_strategy="no",
        optim="sgd", disable_tqdm=True, train_sampling_strategy="sequential", lr_scheduler_type="constant",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()


def found(case: str, rank: int, directory: Path) -> dict[str, Tensor]:
    model = build(case)
    make_memory_efficient(model)
    if case == "trainer":
        trained(model, directory, batch=2, accumulation=2)
        return {name: value.detach().clone() for name, value in model.named_parameters()}
    wrapped, ids = distribute(case, model), tokens(batch=WORLD)[rank : rank + 1]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(g, "full_tensor", g.clone)() for name, g in gradients.items()}


def main() -> None:
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    # accelerate asks for these, and takes the group that is there: nobody listens at the address.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    feed_forward.chunks_for = lambda x, hidden: min(3, x.shape[1])
    join(rank, WORLD, directory)
    for case in CASES:
        save_file(found(case, rank, directory), directory / f"{case}-{rank}.safetensors")
    leave()


if __name__ == "__main__":
    main()
