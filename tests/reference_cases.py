"""Stored runs of the reference system: ``load("encoder_dw8")`` gives its config and tensors.

``tests/reference`` holds those that fit a repository; ``README.md`` there says which, and what was left out of them.
All cases run where the shared set lies beside the project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

FOLDER = Path(__file__).parent / "reference"
SHARED = Path(__file__).parents[2] / "shared" / "reference"


class Case(NamedTuple):
    """One ``.npz``: its JSON config and its tensors by group (``in``, ``out``, ``weights``, ``grads``, ``after``)."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below ``prefix/``, without the prefix."""
        start = prefix + "/"
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def load(name: str, folder: Path | None = None) -> Case:
    """Read a case: the whole one of the shared set, or where there is none, the copy in ``tests/reference``."""
    path = (folder or SHARED) / f"{name}.npz"
    with np.load(path if path.exists() else FOLDER / f"{name}.npz") as archive:
        tensors = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "config"}
        return Case(name, json.loads(str(archive["config"])), tensors)


def names(prefix: str) -> list[str]:
    """Cases whose name starts so, stored here or in the shared set."""
    found = {path.stem for folder in (FOLDER, SHARED) if folder.is_dir() for path in folder.glob(f"{prefix}*.npz")}
    return sorted(found)


def all_names() -> dict[str, str]:
    """Every case that was ever made, and its kind."""
    index = json.loads((FOLDER / "index.json").read_text())
    return {entry["file"].removesuffix(".npz"): entry["kind"] for entry in index}
