"""Other projects' packages that a comparison needs, most of them installed apart from this one's environment."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from ..training.files import RunError

OUR_MODULE = __name__.partition(".")[0]
OUR_DISTRIBUTION = OUR_MODULE.replace("_", "-")


@dataclass(frozen=True)
class Package:
    """A distribution, the module it is imported as, and where it comes from.

    ``requirements`` are what pip installs, without further dependencies, into a folder of the package's own;
    ``extra`` instead names the optional dependencies of ours that bring it into the environment.
    """

    distribution: str
    module: str
    requirements: tuple[str, ...] = ()
    extra: str | None = None

    @property
    def shadows_ours(self) -> bool:
        """Whether it has our import name, so that the environment's copy of that name is not it."""
        return self.module == OUR_MODULE

    def folder(self, packages: Path) -> Path:
        return packages / self.distribution

    def version(self, packages: Path) -> str | None:
        """The version found, in its own folder first and then in the environment; None if there is none."""
        environment = [] if self.shadows_ours else sys.path
        for found in metadata.distributions(name=self.distribution, path=[str(self.folder(packages)), *environment]):
            return found.version
        return None

    def pip_arguments(self, packages: Path) -> list[str]:
        """What follows ``pip`` to install it."""
        if self.extra is not None:
            return ["install", f"{OUR_DISTRIBUTION}[{self.extra}]"]
        # Without dependencies: a second PyTorch beside the environment's must not come along.
        return ["install", "--no-deps", "--target", str(self.folder(packages)), *self.requirements]

    def install(self, packages: Path) -> None:
        """Install into the package's own folder.

        Raises:
            RunError: pip failed; carries what it said.
        """
        command = [sys.executable, "-m", "pip", *self.pip_arguments(packages)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"installing {self.distribution} failed:\n{done.stderr[-2000:]}")

    @contextmanager
    def imported(self, packages: Path) -> Iterator[ModuleType]:
        """Import the package, from its own folder first, and keep it importable for the rest of this process.

        One with our import name stands in for ours only while the block runs, so that the imports it makes of itself
        find itself; its objects stay usable afterwards.
        """
        folder = str(self.folder(packages))
        ours = _take_modules(self.module) if self.shadows_ours else {}
        sys.path.insert(0, folder)
        try:
            yield importlib.import_module(self.module)
        finally:
            if self.shadows_ours:
                sys.path.remove(folder)
                _take_modules(self.module)
                sys.modules.update(ours)


def _take_modules(name: str) -> dict[str, ModuleType]:
    taken = [module for module in sys.modules if module == name or module.startswith(name + ".")]
    return {module: sys.modules.pop(module) for module in taken}


UPSTREAM = Package(OUR_DISTRIBUTION, OUR_MODULE, ("memory-efficient-attention-pytorch==0.1.6",))
X_TRANSFORMERS = Package(
    "x-transformers", "x_transformers", ("x-transformers", "einx", "frozendict", "loguru", "torch-einops-utils")
)
TRANSFORMERS = Package("transformers", "transformers", extra="huggingface")
