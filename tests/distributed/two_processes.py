"""One of two processes that train together over gloo: `python -m tests.distributed.two_processes RANK DIRECTORY`.

Every case of CASES takes two steps of SGD, each rank with a batch of its own; the gradients and the loss of each step
go to DIRECTORY/CASE-RANK.safetensors. The cases' networks and batches are built here for the test too.
"""

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from memory_efficient_attention_pytorch import Attention, Chunked, FeedForward, Transformer
from tests.processes import join, leave

WORLD, STEPS, RATE = 2, 2, 0.1


class Language(nn.Module):
    """A Transformer, a layer that rank 0 alone uses and one that nobody does."""

    def __init__(self, **kwargs):
        super().__init__()
        self.net = Transformer(
            num_tokens=19, max_seq_len=16, dim=16, depth=3, heads=4, dim_head=4, causal=True, ff_mult=2, **kwargs
        )
        self.sometimes, self.never = nn.Linear(16, 1), nn.Linear(3, 3)

    def forward(self, tokens: Tensor, rank: int) -> Tensor:
        loss = self.net(tokens, labels=tokens.roll(-1, 1))
        return loss + self.sometimes(self.net.token_emb(tokens)).mean() if rank == 0 else loss


class Layers(nn.Module):
    """Layers in pieces one after another, outside of any reversible sequence."""

    def __init__(self):
        super().__init__()
        mixer = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))
        self.net = nn.Sequential(
            nn.Embedding(19, 16),
            Chunked(mixer, chunks=3),
            Attention(dim=16, heads=4, dim_head=4, head_chunks=2),
            FeedForward(16, 2, chunks=4),
        )

    def forward(self, tokens: Tensor, rank: int) -> Tensor:
        return self.net(tokens).square().mean()


CASES = {
    "ddp": lambda: Language().net,
    "ddp in pieces": lambda: Language(head_chunks=2, ff_chunks=3).net,
    "ddp kept attention": lambda: Language(head_chunks=2, keep_attention=True).net,
    "ddp unused": Language,
    "ddp layers": Layers,
    "fsdp": lambda: Language().net,
    "fsdp in pieces": lambda: Language(head_chunks=2, ff_chunks=3, positions="rotary").net,
    "fsdp kept attention": lambda: Language(keep_attention="cpu").net,
    "fsdp exact autocast": lambda: Language(exact=True, tie_embeddings=True).net,
    "fsdp layers": Layers,
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case]()


def loss_of(net: nn.Module, case: str, rank: int, step: int) -> Tensor:
    """The loss of a rank's own batch in a step."""
    tokens = torch.randint(19, (2, 13), generator=torch.Generator().manual_seed(10 * step + rank))
    with autocast(case):
        whole = isinstance(getattr(net, "module", net), Transformer)
        return net(tokens, labels=tokens.roll(-1, 1)) if whole else net(tokens, rank)


def autocast(case: str) -> AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in case)


def train(case: str, rank: int, directory: Path) -> None:
    model = build(case)
    found, net = {}, distribute(model, case)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for step in range(STEPS):
        loss = loss_of(net, case, rank, step)
        found[f"{step}.loss"] = loss.detach()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{step}.{name}"] = getattr(parameter.grad, "full_tensor", parameter.grad.clone)()
        optimizer.step()
        optimizer.zero_grad()
    save_file(found, directory / f"{case}-{rank}.safetensors")


def distribute(model: nn.Module, case: str) -> nn.Module:
    if case.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters="unused" in case)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for part in model.layers if isinstance(model, Transformer) else model.net:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def refusal(rank: int) -> str:
    """What happens to one who shards a branch instead of its block."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    model = build("fsdp")
    fully_shard(model.layers[1][0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    try:
        loss_of(model, "fsdp", rank, 0)
    except ValueError as error:
        return str(error)
    return "nothing"


def main() -> None:
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    join(rank, WORLD, directory)
    for case in CASES:
        train(case, rank, directory)
    (directory / f"refusal-{rank}.txt").write_text(refusal(rank))
    leave()


if __name__ == "__main__":
    main()
