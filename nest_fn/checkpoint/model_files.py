"""A model on disk: ``save`` and ``load`` a folder, ``save_file`` a single file; ``load`` reads both.

    save("model", params, state, cfg)
    params, state, cfg = load("model")

Tensors keep their dtype and all their bits; they are loaded on the CPU. Reading a file executes no code. The functions
that a trainer needs, for other trees and for the checkpoints of a run, can be imported from here too.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from nest_fn.arguments import check_trees as check_arguments
from nest_fn.config import Config, ConfigError
from nest_fn.config.parse.yaml_io import parse
from nest_fn.config.writer import to_text
from nest_fn.errors import CheckpointError
from nest_fn.files.atomic import atomic_write, last_complete
from nest_fn.files.quoting import shown
from nest_fn.files.tensors import SUFFIXES, check_writable, read_tensors, size_of, write_tensors
from nest_fn.files.tree_spec import leaves_of, rebuild, tree_spec
from nest_fn.layers.tree import flatten, kind_mismatch
from nest_fn.layers.types import Params, State, Tensor
from nest_fn.model import abstract

from .folder import (
    FORMAT,
    META,
    SCHEMA,
    Checkpoint,
    digest_of,
    own_checkpoint,
    read_checkpoint,
    read_meta,
    verify,
    write_checkpoint,
)
from .retention import latest, list_checkpoints, newest_valid, prune, step_path

__all__ = [
    "META",
    "Checkpoint",
    "CheckpointError",
    "check_trees",
    "latest",
    "list_checkpoints",
    "load",
    "newest_valid",
    "prune",
    "read_checkpoint",
    "read_meta",
    "save",
    "save_file",
    "step_path",
    "verify",
    "write_checkpoint",
]


def save(
    path: str | Path, params: Params, state: State, cfg: Config, step: int = 0, *, overwrite: bool = False
) -> None:
    """Write params, state and config to a folder. ``step`` is the number of updates done.

    ``overwrite=True`` replaces an earlier checkpoint, which stays until the new one is complete. Raises ``OutputError``
    if anything else exists at ``path``, ``CheckpointError`` if writing fails, ``TypeError`` or ``ValueError`` if the
    trees do not match ``cfg``.
    """
    check_trees("save", params, state, cfg)
    _check_step("save", step)
    replaces = own_checkpoint if overwrite else None
    trees = {"params": params, "state": state}
    write_checkpoint(path, trees, cfg.to_dict(), {"step": step}, replaces=replaces)


def save_file(
    path: str | Path, params: Params, state: State, cfg: Config, step: int = 0, *, overwrite: bool = False
) -> None:
    """Write one file, ``.safetensors`` or ``.pt``, with the config as metadata.

    Raises ``ValueError`` for another suffix; otherwise as ``save`` does.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"save_file: '{path.name}' must end in {' or '.join(SUFFIXES)}.")
    check_writable(path)
    check_trees("save_file", params, state, cfg)
    _check_step("save_file", step)
    trees = {"params": params, "state": state}
    leaves = leaves_of(trees)
    texts = {
        "format": FORMAT,
        "schema": str(SCHEMA),
        "step": str(step),
        "config": to_text(cfg.to_dict()),
        "structure": json.dumps(tree_spec(trees)),
    }
    texts["sha256"] = digest_of(leaves, texts)
    with atomic_write(path, size_of(leaves), replaces=_own_file if overwrite else None) as temporary:
        write_tensors(temporary, leaves, texts)


def _own_file(path: Path) -> str | None:
    """A ``replaces`` of ``atomic_write``: None if ``save_file`` wrote the file, else why it is not replaced."""
    try:
        ours = read_tensors(path)[1].get("format") == FORMAT
    except (CheckpointError, OSError):
        ours = False
    return None if ours else "is there already, and no file of this library"


def load(path: str | Path) -> tuple[Params, State, Config]:
    """Read params, state and config that ``save``, ``save_file`` or a trainer wrote, onto the CPU.

    Of the folder of a run its newest valid checkpoint is read; ``nest_fn.interop.convert.read_any`` reads the
    reference's files too. Raises ``CheckpointError`` naming the file that is missing, damaged, of another schema, or
    does not match its config.
    """
    path = last_complete(path)
    if path.is_dir():
        path = _checkpoint_in(path)
        trees, settings, _ = read_checkpoint(path)
    else:
        trees, settings = _read_file(path)
    missing = [name for name in ("params", "state") if name not in trees]
    if missing:
        raise CheckpointError(f"{path}: has no {missing[0]}, only {', '.join(trees) or 'nothing'}.")
    params, state = trees["params"], trees["state"]
    try:
        cfg = Config.from_dict(settings)
        check_trees(str(path), params, state, cfg)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its config is not one of this version: {error}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from error
    return params, state, cfg


def _checkpoint_in(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, else the newest valid checkpoint of the run in it."""
    if (folder / META).exists():
        return folder
    for place in (folder, folder / "checkpoints"):
        path, problems = newest_valid(place)
        for problem in problems:
            warnings.warn(f"{problem} The one before it is taken.", stacklevel=3)
        if path is not None:
            return path
    raise CheckpointError(f"{folder}: holds no checkpoint; give a folder with {META} in it, or one of a run.")


def check_trees(what: str, params: Params, state: State, cfg: Config) -> None:
    """Raise ``ValueError`` listing the leaves that are missing, unknown or of another shape than in ``cfg``.

    Dtypes are not checked, as a model may be stored in half precision.
    """
    check_arguments(what, cfg, params, state, "params", "state")
    trees = {"params": params, "state": state}
    template = dict(zip(trees, abstract(cfg), strict=True))
    wanted, given = flatten(template), flatten(trees)
    problems = [f"'{path}' {list(leaf.shape)} is missing" for path, leaf in wanted.items() if path not in given]
    problems += [f"'{path}' has no place in its config" for path in given if path not in wanted]
    for path in wanted.keys() & given.keys():
        have, want = list(given[path].shape), list(wanted[path].shape)
        if have != want:
            problems.append(f"'{path}' is {have}, its config wants {want}")
    mismatch = None if problems else kind_mismatch(trees, template)
    problems += [mismatch] if mismatch else []
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{what}: {'; '.join(sorted(problems)[:5])}{more}.")


def _check_step(what: str, step: object) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{what}: step is {shown(step)}; pass the number of updates done, 0 or more.")


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: must be a folder, or a file that ends in {' or '.join(SUFFIXES)}.")
    return _from_flat(str(path), *read_tensors(path))


def _from_flat(source: str, leaves: dict[str, Tensor], texts: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rebuild trees and settings from the tensors and metadata of a single file. Raises ``CheckpointError``."""
    if texts.get("format") != FORMAT:
        raise CheckpointError(f"{source}: holds tensors, but does not say that they are of this library.")
    if texts.get("schema") != str(SCHEMA):
        raise CheckpointError(f"{source}: schema {texts.get('schema')!r}, this version reads {SCHEMA}.")
    seal = texts.pop("sha256", None)
    if seal != digest_of(leaves, texts):
        raise CheckpointError(f"{source}: its contents changed since they were written; take another copy.")
    try:
        trees = rebuild(json.loads(texts["structure"]), leaves)
        return trees, dict(parse(texts["config"], source))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source}: {error}.") from error
