"""Stored runs of the reference system: ``load("quant_l2_b1_c1")`` gives a case's config and tensors.

Features, encoders and whole steps are compared with what the reference computes in float64 (``exact``), from the inputs
and weights of its float32 run: in float64 both sides agree to rounding on any processor, in float32 they do not.
``tests/reference`` and ``tests/reference64`` hold those that fit a repository; ``README.md`` there says which, and what
was left out of them. All cases run where the shared sets lie beside the project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

FOLDER, FOLDER64 = (Path(__file__).parent / name for name in ("reference", "reference64"))
SHARED, SHARED64 = (Path(__file__).parents[2] / "shared" / name for name in ("reference", "reference64"))


class Case(NamedTuple):
    """One run: its JSON config and its tensors by group (``in``, ``out``, ``weights``, ``grads``, ``after``)."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    zero: frozenset[str] = frozenset()  # gradients that are zero in exact arithmetic

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below ``prefix/``, without the prefix."""
        start = prefix + "/"
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def load(name: str, folder: Path | None = None) -> Case:
    """A float32 run: the whole one of the shared set, or where there is none, the copy in ``tests/reference``."""
    path = (folder or SHARED) / f"{name}.npz"
    tensors, texts = _read(path if path.exists() else FOLDER / f"{name}.npz")
    return Case(name, json.loads(texts["config"]), tensors)


def exact(name: str) -> Case:
    """The float64 run: inputs and weights of the float32 run in float64, outputs as they are computed from these."""
    case = load(name)
    given = {key: _double(value) for key, value in case.tensors.items() if key.startswith(("in/", "weights/"))}
    stored = FOLDER64 / f"{name}.float64.npz"
    tensors, texts = _read(stored if stored.exists() else SHARED64 / stored.name)
    return Case(name, case.config, given | tensors, frozenset(json.loads(texts.get("zero", "[]"))))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, and what is text."""
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    texts = {key: str(array) for key, array in arrays.items() if array.dtype.kind == "U"}
    return {key: torch.from_numpy(array) for key, array in arrays.items() if key not in texts}, texts


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def names(prefix: str) -> list[str]:
    """Cases whose name starts so, stored here or in the shared set."""
    found = {path.stem for folder in (FOLDER, SHARED) if folder.is_dir() for path in folder.glob(f"{prefix}*.npz")}
    return sorted(found)


def exact_names(prefix: str) -> list[str]:
    """Those of them that have a float64 run."""
    found = {path.name for folder in (FOLDER64, SHARED64) if folder.is_dir() for path in folder.glob("*.npz")}
    return [name for name in names(prefix) if f"{name}.float64.npz" in found]


def all_names() -> dict[str, str]:
    """Every case that was ever made, and its kind."""
    index = json.loads((FOLDER / "index.json").read_text())
    return {entry["file"].removesuffix(".npz"): entry["kind"] for entry in index}
