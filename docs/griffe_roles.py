"""Docstrings as the site shows them: a role such as ``:class:`Attention``` becomes a link where there is a page."""

import ast
import re
from pathlib import Path

import griffe

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "memory_efficient_attention_pytorch"
ROOMS = ("", "distributed", "huggingface", "planner", "training")
ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda match: as_link(match[1]), obj.docstring.value)


def as_link(name):
    home = next((room for room in ROOMS if name in PUBLIC[room]), None)
    if home is None:
        return f"`{name.lstrip('.')}`"
    return f"[`{name}`][{'.'.join(filter(None, (PACKAGE.name, home, name)))}]"


def public_names(room):
    """The ``__all__`` of a room, read and not imported."""
    for node in ast.parse((PACKAGE / room / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise LookupError(f"{room} has no __all__")


PUBLIC = {room: public_names(room) for room in ROOMS}
