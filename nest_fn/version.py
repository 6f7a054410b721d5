"""The version of the library, which pyproject.toml reads from here, and a digest of its source files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Versions of this library and of PyTorch, as recorded in files."""
    import torch

    return {"nest_fn": __version__, "torch": torch.__version__.partition("+")[0]}


def code_digest() -> str:
    """SHA-256 of the paths and contents of the library's source files."""
    sha = hashlib.sha256()
    root = Path(__file__).parent
    folders = os.walk(root, followlinks=True)  # layers and train are links in a checkout, folders in a wheel
    for file in sorted(Path(folder) / name for folder, _, names in folders for name in names if name.endswith(".py")):
        sha.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return sha.hexdigest()
