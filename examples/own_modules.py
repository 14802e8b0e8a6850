"""A reversible network of one's own modules: convolutions along the sequence and an MLP in chunks.

    python examples/own_modules.py --tokens 4096 --depth 4

Learns to smooth a noisy signal, and shows what backward keeps of the forward pass: stored, it grows with every block.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memory_efficient_attention_pytorch import Chunked, PreNorm, ReversibleSequence


class Mix(nn.Module):
    """A depthwise convolution along the tokens of ``(b, n, dim)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)


def network(dim: int, depth: int, reversible: bool) -> nn.Sequential:
    def block() -> tuple[nn.Module, nn.Module]:
        mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        return PreNorm(dim, Mix(dim)), PreNorm(dim, Chunked(mlp, chunks=8))

    blocks = ReversibleSequence([block() for _ in range(depth)], reversible=reversible)
    return nn.Sequential(nn.Linear(1, dim), blocks, nn.Linear(dim, 1))


def bytes_kept(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps for backward, parameters aside, each tensor's memory once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(kept.values())


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    time = torch.linspace(0, 20, chosen.tokens)
    clean = torch.stack([torch.sin(time * rate) for rate in (1.0, 1.7, 2.3, 3.1)])[..., None]
    for reversible in (False, True):
        for depth in (chosen.depth, 2 * chosen.depth):
            kept = bytes_kept(network(chosen.dim, depth, reversible), clean)
            how = "reversible" if reversible else "stored"
            print(f"{how:>10}, {depth:2} blocks: {kept / 2**20:7.1f} MiB kept for backward")

    model = network(chosen.dim, chosen.depth, reversible=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for number in range(1, chosen.steps + 1):
        loss = nn.functional.mse_loss(model(clean + torch.randn_like(clean)), clean)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number % max(1, chosen.steps // 6) == 0:
            print(f"step {number:3}  mean squared error {losses[-1]:.3f} (of the noise: 1)")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
