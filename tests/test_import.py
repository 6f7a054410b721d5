"""What ``import nest_fn`` brings along: nothing optional, and little time beyond torch's own (faults G6)."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 2.0  # of CPU on top of torch's; 0.95 were seen at 2.6 GHz, 0.8 of them for torch._dynamo, which mel.py wakes
EVERYWHERE = {"setuptools", "wheel", "pytest", "pytest_xdist", "hypothesis", "mypy", "ruff", "types_pyyaml"}  # tools
EVERYWHERE |= {"mkdocs", "mkdocstrings", "pygments"}

ALONE = """
import json, sys, time
import torch
started = time.process_time()
import nest_fn
from nest_fn import Config, features, init, key, load, log_mel, loss, nemo, save
took = time.process_time() - started
print(json.dumps({"took": took, "modules": sorted(sys.modules)}))
"""
WITHOUT = """
import importlib, json, pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # None: an import of it fails
import nest_fn
found = [module.name for module in pkgutil.walk_packages(nest_fn.__path__, "nest_fn.")]
for name in found:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(json.dumps(found))
"""


def _optional() -> set[str]:
    """Import names of the packages that only an extra asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [name for extra in project["optional-dependencies"].values() for name in extra]
    return {re.split(r"[^\w-]", name)[0].replace("-", "_").lower() for name in wanted} - EVERYWHERE


def _python(script: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """After ``import torch, nest_fn`` in a process of its own."""
    return _python(ALONE)


def test_no_optional_package_is_imported(alone: dict[str, Any]) -> None:
    assert _optional() == {
        "soundfile", "matplotlib", "tensorboard", "safetensors", "onnx", "onnxscript", "onnxruntime", "sentencepiece",
        "tokenizers", "flashlight_text", "shtab", "wandb", "pyarrow", "fsspec", "aiohttp", "scipy",
    }  # fmt: skip
    modules = {name.partition(".")[0] for name in alone["modules"]}
    assert {"nest_fn", "torch", "numpy", "yaml"} <= modules
    assert not _optional() & modules
    late = ("nest_fn.train", "torch.utils.tensorboard", "torch._inductor.compile_fx", "torch._dynamo", "torchaudio")
    assert not [name for name in late if name in alone["modules"]]


def test_the_face_alone_waits_for_nothing() -> None:
    found = _python("import json, sys, nest_fn; nest_fn.__version__; print(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "numpy", "torchaudio"} & set(found)


def test_every_public_name_is_there() -> None:
    face = importlib.import_module("nest_fn")
    assert all(getattr(face, name) is not None for name in face.__all__)
    assert set(face.__all__) <= set(dir(face))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = face.nonsense


def test_the_import_is_quick(alone: dict[str, Any]) -> None:
    assert alone["took"] < SECONDS


def test_every_module_is_imported_without_the_extras() -> None:
    found = _python(WITHOUT, *sorted(_optional()), "torch.utils.tensorboard")
    assert len(found) > 80
    assert {"nest_fn.interop.export", "nest_fn.layers.linear", "nest_fn.train.cli.main"} <= set(found)
