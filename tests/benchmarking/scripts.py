"""The scripts of benchmarks/, which are not in the package."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    if not FOLDER.exists():
        pytest.skip("benchmarks/ is only in a checkout")
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # a script may import what is beside it
        spec.loader.exec_module(module)
    return module
