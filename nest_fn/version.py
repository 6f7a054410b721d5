"""What this library is: its version, which pyproject.toml takes from here, and the digest of its source files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """The versions of this library and of PyTorch, as files record them."""
    import torch

    return {"nest_fn": __version__, "torch": torch.__version__.partition("+")[0]}


def code_digest() -> str:
    """SHA-256 of the library's own source files and their places."""
    sha = hashlib.sha256()
    root = Path(__file__).parent
    folders = os.walk(root, followlinks=True)  # layers and train stand behind links in a checkout, not in a wheel
    for file in sorted(Path(folder) / name for folder, _, names in folders for name in names if name.endswith(".py")):
        sha.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return sha.hexdigest()
