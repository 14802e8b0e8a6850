"""Decide whether hand-written arithmetic may replace a module's ``forward``, by one rule for all layers."""

from __future__ import annotations

import torch
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
    if not torch.compiler.is_compiling() and not _is_as_written(type(module)):
        return "its class's forward has been replaced"
    if module_has_hooks(module):
        return "it has hooks"
    if all_modules_have_hooks():
        return "there are hooks on all modules"
    if not are_plain(*module.parameters(recurse=False)):
        return "its parameters are tensors of another type, or within a transform of torch.func"
    return None


def _is_as_written(kind: type[nn.Module]) -> bool:
    """Return False if a class of PyTorch's or of this package has a ``forward`` from elsewhere, or a ``__call__``."""
    for each in kind.__mro__:
        known = each.__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])
        written_in = getattr(vars(each).get("forward"), "__globals__", {}).get("__name__")
        if "forward" in vars(each) and known and written_in != each.__module__:
            return False
    return kind.__call__ is nn.Module.__call__
