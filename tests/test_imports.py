"""The house keeps its floors: what may import what, who may print, and what loads only when it is used."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import memory_efficient_attention_pytorch

PACKAGE = "memory_efficient_attention_pytorch"
ROOT = Path(memory_efficient_attention_pytorch.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Rooms by floor. A room imports what is in itself and in the rooms of lower floors; those of one floor are strangers.
FLOORS = (
    {"torch_internals"},
    {"common"},
    {"attention", "recompute"},
    {"loss", "distributed"},
    {"layers"},
    {"models"},
    {"planner"},
    {"huggingface"},
    {"training"},
    {"benchmarking"},
    {"cli"},
    {"__main__"},
    # The names of version 0.1, which nothing of ours imports.
    {
        *("memory_efficient_attention", "flash_attention", "cosine_sim_flash_attention", "reversible"),
        *("memory_efficient_cosine_sim_attention", "transformer", "autoregressive_wrapper"),
    },
)
PORCHES = FLOORS[-1]
OPTIONAL = {"accelerate", "rich", "matplotlib", "tensorboard", "tokenizers", "tomli_w", "transformers"}
# The pipe from a measuring process to the one that started it; and how a thread ends a process whose main thread waits
# for one that is dead.
EXCEPTIONS = {("benchmarking/measure.py", "sys.stdout.write"), ("training/watch.py", "os._exit")}


def module_name(path: Path) -> str:
    """`functional.tiled` for functional/tiled.py, `planner` for planner/__init__.py, '' for the root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def floor_of(module: str) -> int:
    top = module.split(".")[0]
    (floor,) = (i for i, names in enumerate(FLOORS) if top in names)
    return floor


class Imports(ast.NodeVisitor):
    """Every import of a file: dotted name, line, and whether it happens when the file is imported."""

    def __init__(self, path: Path) -> None:
        self.path, self.depth, self.for_types = path, 0, 0
        self.found: list[tuple[str, int, bool]] = []
        self.visit(ast.parse(path.read_text()))

    def visit_Import(self, node):
        self.found += [(alias.name, node.lineno, self.at_import) for alias in node.names]

    def visit_ImportFrom(self, node):
        names = [alias.name for alias in node.names]
        if not node.level:
            base = node.module
        else:
            package = self.path.relative_to(ROOT).parts[:-1]
            above = package[: len(package) - node.level + 1]
            base = ".".join((PACKAGE, *above, *([node.module] if node.module else [])))
        # `from . import tiled` names a module, `from .tiled import attention` something in one.
        inside = base.removeprefix(PACKAGE).lstrip(".") if base.split(".")[0] == PACKAGE else None
        for name in names:
            whole = f"{inside}.{name}".lstrip(".") if inside is not None else None
            self.found.append((f"{PACKAGE}.{whole}" if whole in MODULES else base, node.lineno, self.at_import))

    def visit_FunctionDef(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node):
        types_only = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self.for_types += types_only
        for child in node.body:
            self.visit(child)
        self.for_types -= types_only
        for child in node.orelse:
            self.visit(child)

    @property
    def at_import(self) -> bool:
        return not self.depth and not self.for_types


@cache
def imports(path: Path) -> list[tuple[str, int, bool]]:
    return Imports(path).found


def own_imports(path: Path) -> list[tuple[str, int, bool]]:
    """Those from this package, without its name."""
    inside = [(name, *rest) for name, *rest in imports(path) if name.split(".")[0] == PACKAGE]
    return [(name.removeprefix(PACKAGE).lstrip("."), *rest) for name, *rest in inside]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_the_reader_of_imports_sees_them_all(tmp_path):
    """A test that reads nothing would pass for ever."""
    assert len(FILES) > 20
    assert ("common.errors", True) in [(n, now) for n, _, now in own_imports(MODULES["attention.visibility"])]
    assert ("attention.decision", True) in [(n, now) for n, _, now in own_imports(MODULES["attention.functional"])]
    source = tmp_path / "source.py"
    source.write_text(
        "import a.b, c\nfrom d import e\nif TYPE_CHECKING:\n    import f\nelse:\n    import g\n"
        "def h():\n    import i\nclass J:\n    import j\ntry:\n    import k\nexcept ImportError:\n    pass\n"
    )
    found = Imports(source).found
    assert [name for name, _, _ in found] == ["a.b", "c", "d", "f", "g", "i", "j", "k"]
    assert [name for name, _, now in found if now] == ["a.b", "c", "d", "g", "j", "k"]


def test_every_module_has_a_floor():
    homeless = [m for m in MODULES if m and sum(m.split(".")[0] in names for names in FLOORS) != 1]
    assert not homeless, "give each new module or package one floor, in FLOORS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    """Imports inside of functions and those for types alone count, too."""
    if path == ROOT / "__init__.py":
        return
    room, floor = module_name(path).split(".")[0], floor_of(module_name(path))
    upward = [
        f"{where(path, line)} imports {name}"
        for name, line, _ in own_imports(path)
        if not name or (name.split(".")[0] != room and floor_of(name) >= floor)
    ]
    assert not upward


def test_no_module_waits_for_itself():
    """No circle among imports, whenever they run and whatever they are for."""
    graph = {
        name: {other for other, *_ in own_imports(path) if other in MODULES and other != name}
        for name, path in MODULES.items()
        if name
    }
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(PORCHES))
def test_the_names_of_version_0_1_are_only_passed_on(name):
    """In 25 lines at most: a docstring, imports, what is exported, and of the lazy one where its names are."""
    source = MODULES[name].read_text()
    assert len(source.splitlines()) <= 25
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr, ast.If)
    assert all(isinstance(statement, kinds) for statement in ast.parse(source).body)


PRIVATE = re.compile(
    r"torch\.(utils\.)?_(?!_)|import torch\._|from torch\._|\._modules\b|\b_cdata\b|ops\.mkldnn"
    r"|ops\.aten\._|\baten\._|hooks_dict|\._\w+_hooks\b|\._version\b|\._use_count|_sequence_nr|ctypes\.pythonapi|\._schema\b"
)


def test_private_parts_of_pytorch_stay_in_their_room():
    """Also where a public module only hands them on; the names that they are asked for by are strings there."""
    found = []
    for name, path in MODULES.items():
        if name.split(".")[0] == "torch_internals":
            continue
        code = ast.unparse(without_docstrings(ast.parse(path.read_text())))
        found += [f"{name}: {match[0]}" for match in PRIVATE.finditer(code)]
    assert not found


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return tree


def calls(path: Path) -> list[tuple[str, int]]:
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [(ast.unparse(node.func), node.lineno) for node in nodes]


def test_only_the_command_line_prints_and_parses_arguments():
    """Everything else returns values, warns or raises."""
    speaking = {"print", "input", "sys.stdout.write", "sys.stderr.write", "sys.exit", "rich.print", "os._exit"}
    loud = []
    for path in FILES:
        if floor_of(module_name(path) or "common") >= floor_of("cli"):
            continue
        file = path.relative_to(ROOT).as_posix()
        loud += [
            f"{where(path, line)} calls {name}"
            for name, line in calls(path)
            if name in speaking and (file, name) not in EXCEPTIONS
        ]
        loud += [
            f"{where(path, line)} imports {name}"
            for name, line, _ in imports(path)
            if name.split(".")[0] in ("argparse", "optparse", "click", "rich")
        ]
    assert not loud


def test_optional_dependencies_load_on_use():
    eager = [
        f"{where(path, line)} imports {name}"
        for path in FILES
        for name, line, now in imports(path)
        if now and name.split(".")[0] in OPTIONAL and not needs_transformers(module_name(path), name)
    ]
    assert not eager


def needs_transformers(module: str, name: str = "transformers") -> bool:
    """The room that is about one optional dependency cannot do without, and nothing loads it unasked."""
    return module.split(".")[0] == "huggingface" and name.split(".")[0] == "transformers"


WITHOUT_OPTIONAL = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {optional}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import torch

def probed(*args, **kwargs):
    raise AssertionError("hardware is probed at import")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_properties = probed
for name in {modules}:
    importlib.import_module(name)
threads, default = torch.get_num_threads(), torch.get_default_dtype()
assert default == torch.float32 and torch.is_grad_enabled()
assert not {{"torch.distributed.fsdp", "torch._inductor"}} & set(sys.modules), "imports stay light"
"""


def test_everything_imports_without_optional_dependencies_in_silence_and_without_looking_at_hardware():
    later = {"__main__", "common.uncompiled"}  # a compiler has been loaded before the second is
    names = [f"{PACKAGE}.{m}".rstrip(".") for m in MODULES if m not in later and not needs_transformers(m)]
    program = WITHOUT_OPTIONAL.format(optional=sorted(OPTIONAL), modules=names)
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert not done.stderr
