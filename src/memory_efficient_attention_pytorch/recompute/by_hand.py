"""Decide whether hand-written arithmetic may replace a module's ``forward``, by one rule for all layers."""

from __future__ import annotations

from torch import nn

from ..torch_internals.hooks import all_modules_have_hooks, module_has_hooks
from ..torch_internals.tensors import are_plain


def reason_against(module: nn.Module, *known: type[nn.Module]) -> str | None:
    """Return why the module's own ``forward`` must run; None if its class alone determines what it computes.

    known: the classes whose arithmetic the caller has written out, subclasses excluded. Without any, the class is not
    checked, only whether this module was changed (hooks, a replaced ``forward``).
    """
    if known and type(module) not in known:
        return f"it is a {type(module).__name__}, no {' or '.join(kind.__name__ for kind in known)}"
    # Hooks that were removed leave the class's own ``forward`` behind as an attribute (accelerate). Only attributes are
    # looked at: a compiler has bound methods of its own.
    own = vars(module).get("forward")
    bound = (getattr(own, "__func__", None), getattr(own, "__self__", None))
    if own is not None and (bound[0] is not type(module).forward or bound[1] is not module):
        return "its forward has been replaced"
    if module_has_hooks(module):
        return "it has hooks"
    if all_modules_have_hooks():
        return "there are hooks on all modules"
    if not are_plain(*module.parameters(recurse=False)):
        return "its parameters are tensors of another type, or within a transform of torch.func"
    return None
