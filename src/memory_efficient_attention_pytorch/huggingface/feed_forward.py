"""Token-wise MLPs, recognised by their structure and a trial run, and computed in chunks of tokens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers.chunked import Chunked
from ..layers.working_set import chunks_for
from ..torch_internals.hooks import module_has_hooks
from ..torch_internals.tensors import are_plain


def candidates(
    module: nn.Module, name: str = "", tried: dict[object, str | None] | None = None
) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield the outermost MLPs as (name, module, reason to leave it or None). tried: reasons found so far on meta."""
    tried = {} if tried is None else tried
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if hasattr(child, "experts"):
            yield full, child, "a mixture of experts: tokens are routed, not chunked"
        elif _looks_like_mlp(child):
            yield full, child, _objection(child, tried)
        else:
            yield from candidates(child, full, tried)


def chunked_forward(module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute an MLP's forward, in chunks where that saves memory. A forward that is not its class's is kept at OWN.

    Hooks of its layers may look at any tokens, so with these it is computed whole.
    """
    own = module.__dict__.get(OWN) or partial(type(module).forward, module)
    whole: Callable[[Tensor], Tensor] = partial(own, *args, **kwargs)
    hooked = any(module_has_hooks(part) for part in module.modules() if part is not module)
    chunks = 1 if hooked or hidden_states.dim() != 3 else chunks_for(hidden_states, _widest(module))
    if chunks == 1:
        return whole(hidden_states)
    result: Tensor = Chunked(_Whole(module, whole), chunks=chunks)(hidden_states)
    return result


OWN = "_memory_efficient_own_forward"


class _Whole(nn.Module):
    """The original MLP: its parameters and its own forward."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__()
        self.module, self.own_forward = module, forward
        self.training = module.training  # a new module would be in training mode

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.own_forward(x.contiguous())  # Conv1D needs it, and a chunk of several sequences is not
        return result


def _linears(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]


def _widths(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    assert isinstance(linear, Conv1D)
    return int(linear.weight.shape[0]), int(linear.weight.shape[1])


def _widest(module: nn.Module) -> int:
    # A gated MLP keeps two factors and their product; like any other, it counts as two tensors of its widest layer.
    return max(max(_widths(linear)) for linear in _linears(module))


def _looks_like_mlp(module: nn.Module) -> bool:
    """Return True for a module of one input and no mask, of linear layers only, one wider than the input."""
    linears = _linears(module)
    if len(linears) < 2 or isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Linear):
        return False
    if hasattr(module, "base_layer"):  # a linear layer with an adapter
        return False
    taken = inspect.signature(module.forward).parameters
    required = [
        p
        for p in taken.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    leaves = [m for m in module.modules() if not any(True for _ in m.children())]
    known = all(isinstance(m, nn.Linear | Conv1D) or not any(True for _ in m.parameters()) for m in leaves)
    d, widest = _widths(linears[0])[0], max(_widths(linear)[1] for linear in linears)
    alone = len(required) == 1 and "attention_mask" not in taken
    return alone and known and widest > d and any(_widths(linear)[1] == d for linear in linears)


def _objection(module: nn.Module, tried: dict[object, str | None]) -> str | None:
    """Return why the module cannot be chunked, found by a trial run: each output may depend on its own token only."""
    parameters = list(module.parameters())
    if any(p.device.type == "meta" for p in parameters):
        # One copy stands for all modules of its kind; its weights are one number each and take no memory.
        kind = type(module), *((name, p.shape) for name, p in module.named_parameters())
        if kind not in tried:
            numbers = {
                id(p): nn.Parameter(torch.full((), 0.02, dtype=p.dtype, device="cpu").expand(p.shape))
                for p in parameters
            }
            tried[kind] = _objection(copy.deepcopy(module, numbers), tried)
        return tried[kind]
    if not are_plain(*parameters):
        return "its parameters are sharded: call make_memory_efficient before sharding"
    first = parameters[0]
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            x = torch.linspace(-1, 1, 4 * _widths(_linears(module)[0])[0], device=first.device, dtype=first.dtype)
            x = x.view(1, 4, -1)
            before, after = module(x), module(torch.cat((x[:, :1], x[:, 1:2] + 1, x[:, 2:]), 1))
    except Exception as error:  # a module of another kind, which may want anything
        return f"a trial run failed: {error!r}"
    finally:
        for m, training in modes:
            m.training = training
    if not isinstance(before, Tensor) or before.shape != x.shape:
        return "it does not return one vector for each token"
    others = [0, 2, 3]  # before and behind the changed token: a causal module changes only those behind it
    same = torch.equal(before[:, others], after[:, others])
    return None if same else "a token's output depends on other tokens"
