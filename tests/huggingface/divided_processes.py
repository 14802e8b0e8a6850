"""One of several processes that share each sequence over gloo, with models that were made memory-efficient.

Run as `python -m tests.huggingface.divided_processes RANK WORLD DIRECTORY`; the loss and the gradients of each case go
to DIRECTORY/WORLD-RANK.safetensors.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from memory_efficient_attention_pytorch.distributed import ContextParallel
from memory_efficient_attention_pytorch.huggingface import make_memory_efficient
from tests.huggingface.models import small_model, tokens
from tests.processes import join, leave

TOKENS = 37
KINDS = ("Llama", "Mistral", "GPT2", "Gemma2")
WHAT = ("plain", "padding", "packed")


def inputs(what: str) -> dict[str, Tensor]:
    """A batch whose labels begin late, with padding or several sequences in a row, of whole sequences."""
    ids = tokens(length=TOKENS)
    labels = ids.clone()
    labels[:, :20] = -100
    given = {"input_ids": ids, "labels": labels}
    if what == "padding":
        given["attention_mask"] = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [34]])).long()
        labels[given["attention_mask"] == 0] = -100
    if what == "packed":
        given["position_ids"] = (torch.arange(TOKENS) % 15).expand(2, -1).contiguous()
    return given


def cases(world: int) -> list[tuple[str, str, str, torch.dtype]]:
    """Kind of model, of input, method and dtype."""
    methods = ("ring", "all_to_all")
    found = [(kind, what, method, torch.float64) for kind in KINDS for what in WHAT for method in methods]
    found.append(("Llama", "plain", "ring", torch.float32))
    return [case for case in found if world == 2 or case[0] in ("Llama", "Mistral")]


def trained(
    kind: str, what: str, dtype: torch.dtype, context: ContextParallel | None = None, *, changed: bool = True
) -> dict[str, Tensor]:
    """The loss and the gradients of a model that was made memory-efficient, or of one as transformers made it."""
    model, given = small_model(kind, dtype), inputs(what)
    if changed:
        make_memory_efficient(model)
    if context is None:
        loss = model(**given, use_cache=False).loss
        loss.backward()
    else:
        ids, labels, *others = context.shard(*given.values())
        own: dict[str, Any] = dict(zip(given, (ids, labels, *others), strict=True))
        with context:
            loss = model(**own).loss
        loss.backward()  # what is checkpointed is computed again outside
        context.reduce_gradients(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().reshape(1), **gradients}


def refusals(context: ContextParallel) -> list[str]:
    ids = context.shard(tokens(length=TOKENS))
    model = small_model("Llama")
    told = []
    for options, given in (
        ({"loss": False}, {"input_ids": ids}),
        ({"attention": False}, {"input_ids": ids}),
        ({}, {"input_ids": ids, "use_cache": True}),
        ({}, {}),
    ):
        model = small_model("Llama")
        make_memory_efficient(model, **options)
        try:
            with context:
                model(labels=ids, **given)
            told.append("nothing")
        except (NotImplementedError, ValueError) as error:
            told.append(str(error).replace("\n", " "))
    return told


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    join(rank, world, directory)
    found = {}
    for kind, what, method, dtype in cases(world):
        context = ContextParallel(dist.group.WORLD, method=method)
        for name, value in trained(kind, what, dtype, context).items():
            found[f"{kind}/{what}/{method}/{dtype}/{name}"] = value.contiguous().clone()
    save_file(found, directory / f"{world}-{rank}.safetensors")
    (directory / f"refusals-{world}-{rank}.txt").write_text("\n".join(refusals(context)))
    leave()


if __name__ == "__main__":
    main()
