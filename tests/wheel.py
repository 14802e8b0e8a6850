"""Build what users install, install the wheel without extras, and use it: python tests/wheel.py

The sdist is built from the checkout and the wheel from the sdist, into dist/. The wheel is then installed into a new
environment, build/bare, beside exactly what it requires, taken from the environment that runs this: so nothing is
downloaded, and an undeclared requirement is missing there. build/wheel holds the wheel's files for the test suite,
which finds them before any other: PYTHONPATH=$PWD/build/wheel python -m pytest
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "memory_efficient_attention_pytorch"
DIST, BARE, FILES = ROOT / "dist", ROOT / "build" / "bare", ROOT / "build" / "wheel"


def main() -> None:
    for folder in (DIST, ROOT / "build"):
        shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", ROOT, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    check_contents(sdist, wheel)
    install(wheel, "--target", FILES)
    program = f"import sys, {PACKAGE}; sys.exit(not {PACKAGE}.__file__.startswith({str(FILES)!r}))"
    run(sys.executable, "-c", program, env=os.environ | {"PYTHONPATH": str(FILES)})
    venv.create(BARE, with_pip=False)
    python = BARE / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    link_requirements(wheel, site_packages(python))
    install(wheel, python=python)
    run(sys.executable, "-m", "pip", "--python", python, "check", stdout=subprocess.DEVNULL)
    run(python, "-I", "-W", "error", ROOT / "tests" / "bare.py")


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def install(wheel: Path, *options: object, python: Path = Path(sys.executable)) -> None:
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *options, wheel)


def check_contents(sdist: Path, wheel: Path) -> None:
    """The sdist has every file under version control that its own tests need; the wheel the package and no more."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / PACKAGE).rglob("*.py")}
    packaged = {name for name in inside if ".dist-info/" not in name}
    require(packaged == source | {f"{PACKAGE}/py.typed"}, wheel, packaged ^ source)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    kept = {
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "tests", "docs", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".ipynb") and ROOT / "benchmarks" / "packages" not in path.parents
    }
    beside = {"pyproject.toml", "mkdocs.yml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt"}
    missing = kept | beside
    require(not missing - inside, sdist, missing - inside)


def require(holds: bool, what: Path, difference: set[str]) -> None:
    if not holds:
        raise SystemExit(f"{what.name}: {', '.join(sorted(difference))}")


def site_packages(python: Path) -> Path:
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip())


def link_requirements(wheel: Path, target: Path) -> None:
    """Link what the wheel requires, without extras, and what that requires, into ``target``."""
    (metadata,) = importlib.metadata.distributions(path=[str(FILES)])
    waiting, seen = list(metadata.requires or ()), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        wanted = not requirement.marker or any(
            requirement.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}
        )
        name = requirement.name.lower().replace("_", "-")
        if not wanted or name in seen:
            continue
        seen.add(name)
        installed = importlib.metadata.distribution(requirement.name)
        waiting += installed.requires or ()
        for top in {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = target / top
            if not link.exists():
                link.symlink_to(Path(str(installed.locate_file(top))))


if __name__ == "__main__":
    main()
