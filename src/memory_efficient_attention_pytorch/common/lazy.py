"""Lazy module attributes, imported from where they are defined on first use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

PACKAGE = __name__.partition(".")[0]


def names_from(module: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of ``module`` (PEP 562) for names defined elsewhere in this package.

    Submodules of the package are found too.

    homes: each name and the module that defines it, relative to the package.
    """
    namespace = vars(sys.modules[module])

    def find(name: str) -> Any:
        if name in homes:
            return namespace.setdefault(name, getattr(importlib.import_module(f"{PACKAGE}.{homes[name]}"), name))
        if "__path__" in namespace and not name.startswith("_") and importlib.util.find_spec(f"{module}.{name}"):
            return importlib.import_module(f"{module}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find, lambda: sorted({*namespace, *homes})
