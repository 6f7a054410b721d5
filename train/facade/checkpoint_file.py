"""Checkpoint files of ``PureTorchSSLModel``: one dictionary, as in its original interface (reference 11).

    {"model_state_dict", "config", "epoch", "step", "optimizer_state_dict"?, "seed", "counter"}

It holds only tensors and plain values and is read with ``weights_only=True``. Tensors are named by our dotted paths;
files of the pure-PyTorch port, which use the reference's names, and all other files that ``read_any`` reads are
accepted too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nest_fn.errors import CheckpointError
from nest_fn.files.atomic import atomic_write
from nest_fn.files.tensors import opened, read_torch, tensors_only
from nest_fn.interop.convert import read_any, read_port
from nest_fn.interop.lightning import STAND_INS
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Tensor

WEIGHTS, OPTIMIZER = "model_state_dict", "optimizer_state_dict"


def write_file(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write the dictionary atomically; it may replace an earlier one.

    Raises ``OutputError`` if ``path`` is any other file, ``CheckpointError`` if it cannot be written.
    """
    size = sum(leaf.numel() * leaf.element_size() for leaf in flatten(content).values() if isinstance(leaf, Tensor))
    with atomic_write(path, size, replaces=_own_file) as temporary, open(temporary, "wb") as file:
        torch.save(dict(content), file)


def _own_file(path: Path) -> str | None:
    """None if the file holds such a dictionary, else a text that says why it must not be replaced."""
    try:
        with opened(path) as file:
            content = read_torch(file, str(path), STAND_INS) if file.read(4) == b"PK\x03\x04" else None
    except (CheckpointError, OSError):
        content = None
    ours = isinstance(content, Mapping) and WEIGHTS in content
    return None if ours else "is there already, and no file of such a model"


def read_file(path: str | Path) -> dict[str, Any]:
    """Read such a file's dictionary, or ``params``, ``state``, ``config`` of any other model file.

    Raises ``CheckpointError``.
    """
    path = Path(path)
    if path.is_file():
        with opened(path) as file:
            if file.read(4) == b"PK\x03\x04":
                content = read_torch(file, str(path), STAND_INS)
                if isinstance(content, Mapping) and WEIGHTS in content:
                    return {**content, WEIGHTS: tensors_only(content[WEIGHTS], str(path))} | _plain(content, path)
    params, state, cfg = read_any(path)
    return {"params": params, "state": state, "config": cfg, **_plain({}, path)}


def model_of(content: Mapping[str, Any], source: str) -> tuple[Any, Any, Any]:
    """Params, state and config of a dictionary from ``read_file``. Raises ``CheckpointError``."""
    if WEIGHTS in content:
        return read_port(content, source)
    return content["params"], content["state"], content["config"]


def weights_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name; names are ours or the reference's."""
    return content[WEIGHTS] if WEIGHTS in content else flatten(content["params"]) | flatten(content["state"])


def _plain(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Epoch, step, and, if the file has them, seed and counter. Raises ``CheckpointError``."""
    found: dict[str, Any] = {"epoch": content.get("epoch", 0), "step": content.get("step", 0)}
    found |= {name: content[name] for name in ("seed", "counter") if name in content}
    counter = found.get("counter", [0, 0])
    numbers = [found["epoch"], found["step"], found.get("seed", 0), *(counter if isinstance(counter, list) else [None])]
    if not all(isinstance(number, int) for number in numbers) or len(numbers) != 5:
        raise CheckpointError(f"{path}: epoch, step, seed or counter are not whole numbers; take another copy.")
    return found
