"""The wheel holds one import name, works beside a user's own layers.py, and builds from a checkout without links."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from nest_fn.version import __version__

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nest_fn", "layers", "train", "configs")
SETUPTOOLS = int(importlib.metadata.version("setuptools").partition(".")[0])

needs_setuptools = pytest.mark.skipif(
    SETUPTOOLS < 77, reason=f"setuptools {SETUPTOOLS} cannot build this project; `make test` installs a newer one"
)


def copy_source(target: Path, links: bool) -> Path:
    """The files that make the package, with the links in nest_fn or without them."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for link in ("layers", "train", "configs"):
        path = target / "nest_fn" / link
        if not links and path.is_symlink():
            path.unlink()
    return target


def pip(*arguments: str | Path) -> None:
    """Run pip without network; its output is in the failure."""
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["links", "no links"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_source(folder / "source", links=request.param == "links")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder / "dist", source)
    (path,) = (folder / "dist").glob("*.whl")
    return path


PROBE = """
import nest_fn, nest_fn.layers.random, nest_fn.train
from nest_fn.config import Config
assert Config.preset("nest_large").encoder.d_model == 512
assert Config.preset("tiny").encoder.d_model == 32
print(nest_fn.layers.random.__file__, nest_fn.train.__file__)
"""


@needs_setuptools
def test_wheel_works_beside_hostile_files(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    for name in ("layers", "train", "configs"):
        (work / f"{name}.py").write_text(f"raise RuntimeError('the user\\'s own {name}.py was imported')\n")
    pip("install", "--target", site, wheel)
    (work / "probe.py").write_text(PROBE)
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=work,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(site) for file in done.stdout.split()), done.stdout


@needs_setuptools
def test_wheel_holds_one_import_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"nest_fn", f"nest_fn-{__version__}.dist-info"}
    for folder, package in (
        ("layers", "nest_fn/layers"),
        ("train", "nest_fn/train"),
        ("nest_fn/config", "nest_fn/config"),
    ):
        files = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        packed = {Path(name).relative_to(package) for name in names if name.startswith(f"{package}/")}
        assert files == packed
    assert "nest_fn/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for preset in (ROOT / "configs").glob("*.yaml"):
        assert f"nest_fn/configs/{preset.name}" in names


def test_every_package_folder_is_listed() -> None:
    """Found folders and the explicit list agree; a list is needed because a checkout may have no links."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for folder, package in (("nest_fn", "nest_fn"), *((name, f"nest_fn.{name}") for name in FOLDERS[1:])):
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            if not any(parent.is_symlink() for parent in init.parents):
                found.add(".".join((package, *below)))
    assert found == listed
