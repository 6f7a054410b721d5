"""A checkpoint as a folder: trees of tensors, a configuration, and ``meta.json`` with a digest of every file.

    step_00001000/
        params.safetensors  state.safetensors  ...   one file per tree; .pt if safetensors is not installed
        config.yaml
        meta.json   schema, versions, structure of the trees, size and SHA-256 of each file, and values of the caller

Equal contents give equal bytes: no file records when or where a checkpoint was written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nest_fn.config.parse.problems import ConfigError
from nest_fn.config.parse.yaml_io import read
from nest_fn.config.writer import to_text
from nest_fn.errors import CheckpointError
from nest_fn.files.atomic import Replaces, atomic_write, is_temporary, last_complete
from nest_fn.files.outputs import MARK, contents
from nest_fn.files.tensors import SUFFIXES, opened, read_tensors, size_of, usual_suffix, write_tensors
from nest_fn.files.tree_spec import leaves_of, rebuild, tree_spec
from nest_fn.layers.types import Tensor
from nest_fn.version import versions

FORMAT = "nest_fn"
SCHEMA = 1
META = "meta.json"
_CONFIG = "config.yaml"
_MAX_META = 1 << 26  # bytes
_CHUNK = 1 << 20
_THREADS = 4  # files whose digests are computed at a time
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


class Checkpoint(NamedTuple):
    """Contents of a checkpoint."""

    trees: dict[str, Any]  # nested dicts and lists of tensors on the CPU, by name
    config: dict[str, Any]  # plain values
    meta: dict[str, Any]  # values of the caller, including ``step``, and ``versions``


def write_checkpoint(
    path: str | Path, trees: Mapping[str, Any], config: Mapping[str, Any], meta: Mapping[str, Any] | None = None, *,
    replaces: Replaces | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint folder atomically.

    ``trees``: nested dicts and lists of tensors by name, e.g. params, state, optimizer. ``meta``: values for JSON, such
    as ``{"step": 1000}`` (default step 0). ``replaces`` decides whether an existing ``path`` may be replaced, for
    example ``own_checkpoint``; without it none may. Raises ``OutputError`` if ``path`` may not be replaced,
    ``CheckpointError`` if writing fails, ``ValueError`` for trees and meta that cannot be written.
    """
    suffix = usual_suffix()
    structures = {name: tree_spec(tree) for name, tree in trees.items()}
    for name in trees:
        if not _NAME.fullmatch(name):
            raise ValueError(f"write_checkpoint: tree {name!r} becomes a file; use letters, digits, _ and - alone.")
    leaves = {name: leaves_of(tree) for name, tree in trees.items()}
    content = {
        "format": FORMAT,
        "schema": SCHEMA,
        "versions": versions(),
        "trees": {name: {"file": name + suffix, "structure": structure} for name, structure in structures.items()},
        "meta": {"step": 0, **(meta or {})},
    }
    with atomic_write(path, sum(map(size_of, leaves.values())), folder=True, replaces=replaces) as folder:
        with ThreadPoolExecutor(1) as beside:  # a file's digest is computed while the next one is written
            digests = {}
            for name, tensors in leaves.items():
                file = folder / (name + suffix)
                write_tensors(file, tensors)
                digests[file.name] = beside.submit(_digest, file)
            (folder / _CONFIG).write_text(to_text(config), encoding="utf-8")
            digests[_CONFIG] = beside.submit(_digest, folder / _CONFIG)
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digests[name].result()}
            for name in sorted(digests)
        }
        (folder / META).write_text(_sealed({**content, "files": files}), encoding="utf-8")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read trees, configuration and meta of a folder, after checking the digest of every file.

    Raises ``CheckpointError`` naming the file that is missing, cut short, changed or of another schema.
    """
    path = last_complete(path)
    content = verify(path)
    trees = {}
    for name, entry in content["trees"].items():
        file = path / entry["file"]
        leaves, _ = read_tensors(file)
        try:
            trees[name] = rebuild(entry["structure"], leaves)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: {error}.") from error
    try:
        config = read(path / _CONFIG)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return Checkpoint(trees, config, {**content["meta"], "versions": content["versions"]})


def read_meta(path: str | Path) -> dict[str, Any]:
    """Read ``meta.json`` and check that all other files exist with their full size; their digests are not checked.

    Raises ``CheckpointError``.
    """
    path = last_complete(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no folder; a checkpoint is one, with {META} in it.")
    content = _unsealed(path / META)
    for name, entry in content["files"].items():
        file = path / name
        size = _size(file)
        if size is None:
            raise CheckpointError(f"{file}: is missing (or no plain file); take another checkpoint.")
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: has {size} bytes of {entry['bytes']}, so it is cut short or changed; take another checkpoint."
            )
    return content


def verify(path: str | Path) -> dict[str, Any]:
    """Read ``meta.json`` and check the SHA-256 of every file. Raises ``CheckpointError``."""
    path = last_complete(path)
    content = read_meta(path)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_digest, [path / name for name in content["files"]]))
    for (name, entry), digest in zip(content["files"].items(), digests, strict=True):
        if digest != entry["sha256"]:
            raise CheckpointError(f"{path / name}: its bytes changed since they were written; take another checkpoint.")
    return content


def own_checkpoint(path: Path) -> str | None:
    """A ``replaces`` of ``atomic_write``: None if a folder is a checkpoint and nothing else, else what it is."""
    try:
        listed = {*_unsealed(path / META)["files"], META, MARK}
    except (CheckpointError, OSError):
        return f"{contents(path)}, which is no checkpoint"
    other = [entry.name for entry in path.iterdir() if entry.name not in listed and not is_temporary(entry.name)]
    return f"also holds {other[0]}, which is no part of the checkpoint" if other else None


def digest_of(leaves: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """SHA-256 of named tensors and strings, independent of the file format."""
    sha = hashlib.sha256()
    for name, text in sorted(texts.items()):
        sha.update(json.dumps([name, text]).encode())
    for name, leaf in sorted(leaves.items()):
        sha.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        sha.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _size(file: Path) -> int | None:
    """Size of a regular file in bytes; None if there is none or its name is invalid, such as one that is too long."""
    try:
        return file.stat().st_size if file.is_file() and not file.is_symlink() else None
    except OSError:
        return None


def _digest(file: Path) -> str:
    sha = hashlib.sha256()
    with opened(file) as content:
        while chunk := content.read(_CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def _sealed(content: dict[str, Any]) -> str:
    """JSON text with the digest of its other entries as its first entry."""
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"write_checkpoint: meta wants values that JSON can hold: {error}.") from error
    return json.dumps({"sha256": _seal(json.loads(text)), **content}, indent=1) + "\n"


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unsealed(file: Path) -> dict[str, Any]:
    with opened(file) as raw:
        text = raw.read(_MAX_META + 1)
    try:
        content = json.loads(text.decode("utf-8")) if len(text) <= _MAX_META else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: is damaged or cut short: {str(error)[:200]}; take another checkpoint."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{file}: does not describe a checkpoint of this library.")
    if content.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{file}: schema {content.get('schema')!r}, this version reads {SCHEMA}; read it with what wrote it, "
            f"{content.get('versions')}."
        )
    seal = content.pop("sha256", None)
    try:
        if seal != _seal(content):
            raise CheckpointError(f"{file}: its bytes changed since they were written; take another checkpoint.")
        _check_form(content)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: does not describe a checkpoint of this library ({error}).") from error
    return content


def _check_form(content: dict[str, Any]) -> None:
    """Raise ``TypeError`` or another lookup error unless all entries that are read later have the expected type."""
    for name, entry in content["files"].items():
        if Path(name).name != name or not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
            raise TypeError(f"file {name!r}")
    for name, entry in content["trees"].items():
        if entry["file"] not in content["files"] or not entry["file"].endswith(SUFFIXES) or "structure" not in entry:
            raise TypeError(f"tree {name!r}")
    if _CONFIG not in content["files"] or not isinstance(content["meta"]["step"], int):
        raise TypeError("no config or step")
    if not isinstance(content["versions"], dict):
        raise TypeError("versions")
