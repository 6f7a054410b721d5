"""Reads any file with a NEST model as ``(params, state, cfg)`` and converts it to another format.

Read, by their content: this library's folders and files, the reference's ``.nemo``, Lightning's ``.ckpt``, and ``.pt``
files of the pure-PyTorch port (reference 11). Written: this library's formats and ``.nemo``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nest_fn.checkpoint.folder import digest_of
from nest_fn.checkpoint.model_files import load, save, save_file
from nest_fn.config import Compat, Config, ConfigError
from nest_fn.config.writer import to_text
from nest_fn.errors import CheckpointError
from nest_fn.files.atomic import last_complete
from nest_fn.files.outputs import claim, written
from nest_fn.files.tensors import SUFFIXES, opened, read_torch, size_of, tensors_only
from nest_fn.layers.tree import fill, flatten
from nest_fn.layers.types import Params, State
from nest_fn.model import abstract
from nest_fn.version import versions

from .lightning import STAND_INS, to_plain
from .nemo_archive import read_lightning, read_nemo, trees_from, without_wrappers, write_nemo
from .port_keywords import config_from_keywords, is_flat

_KINDS = ".nemo, .safetensors, .pt, or a name without a suffix for a folder"


def read_any(path: str | Path, compat: Compat | None = None) -> tuple[Params, State, Config]:
    """Read params, state and config from any of these formats, onto the CPU; from a run, its newest valid checkpoint.

    ``compat`` (``current``, ``legacy``) overrides the numerics of the file's config. Raises ``CheckpointError``.
    """
    path = last_complete(path)
    if path.is_dir():
        return _with_compat(load(path), compat)
    with opened(path) as file:
        start = file.read(512)
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return read_nemo(path, compat)
    if start[:4] == b"PK\x03\x04":
        return _read_pickled(path, compat)
    if start[8:9] == b"{":  # a header of safetensors: its length, then JSON
        return _with_compat(load(path), compat)
    raise CheckpointError(
        f"{path}: is neither a .nemo archive nor a .ckpt, .pt or .safetensors file, or it is damaged."
    )


def convert(source: str | Path, target: str | Path, compat: Compat | None = None, *, overwrite: bool = False) -> Config:
    """Convert ``source`` to the format that the suffix of ``target`` names (none: a folder). Returns the config.

    A target made from the same model is left unchanged. Raises ``CheckpointError`` if ``source`` cannot be read or
    ``target`` not written, ``OutputError`` if ``target`` must not be replaced (``nest_fn.files.outputs``).
    """
    target = Path(target)
    if target.suffix not in (".nemo", *SUFFIXES, ""):
        raise CheckpointError(f"{target}: cannot be written as '{target.suffix}'; choose {_KINDS}.")
    params, state, cfg = read_any(source, compat)
    origin = {"command": "convert", "model": model_digest(params, state, cfg), **versions()}
    place = claim(target, origin, folder=target.suffix == "", inputs=[source], overwrite=overwrite)
    if place.done:
        return cfg
    write = write_nemo if target.suffix == ".nemo" else save_file if target.suffix in SUFFIXES else save
    with written(place, size_of({**flatten(params), **flatten(state)})) as temporary:
        write(temporary, params, state, cfg)
    return cfg


def model_digest(params: Params, state: State, cfg: Config) -> str:
    """SHA-256 of a model, independent of the file format."""
    leaves = {f"params.{path}": leaf for path, leaf in flatten(params).items()}
    leaves |= {f"state.{path}": leaf for path, leaf in flatten(state).items()}
    return digest_of(leaves, {"config": to_text(cfg.to_dict())})


def read_port(content: Mapping[str, Any], source: str) -> tuple[Params, State, Config]:
    """Trees and config from the mapping that the port saves, with ``model_state_dict`` and ``config`` (reference 11).

    The config may be nested, as in its YAML, or hold the keywords of the constructor. Tensors may have the reference's
    names or our dotted paths. Raises ``CheckpointError`` listing what does not match.
    """
    settings = to_plain(content.get("config"), source)
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{source}: has no 'config', so its model is not known.")
    try:
        cfg = config_from_keywords(settings) if is_flat(settings) else Config.from_dict(settings)
    except ConfigError as error:
        raise CheckpointError(f"{source}: its config cannot be had here: {error}") from error
    weights = without_wrappers(tensors_only(content["model_state_dict"], source))
    trees = abstract(cfg)
    ours = [(path, leaf.shape) for tree in trees for path, leaf in flatten(tree).items()]
    if {path for path, _ in ours} == weights.keys() and all(weights[path].shape == shape for path, shape in ours):
        params, state = (fill(tree, weights) for tree in trees)
        return params, state, cfg
    return trees_from(weights, cfg, source)


def _read_pickled(path: Path, compat: Compat | None) -> tuple[Params, State, Config]:
    """Read one of the three formats that torch.save writes, distinguished by their entries."""
    with opened(path) as file:
        content = read_torch(file, str(path), STAND_INS)
    entries = content if isinstance(content, Mapping) else {}
    if entries.keys() == {"tensors", "metadata"}:
        return _with_compat(load(path), compat)
    if "state_dict" in entries:
        return read_lightning(content, str(path), compat)
    if "model_state_dict" in entries:
        return _with_compat(read_port(entries, str(path)), compat)
    held = ", ".join(map(str, list(entries)[:5])) or f"a {type(content).__name__}"
    raise CheckpointError(
        f"{path}: holds {held}; a model with its config is wanted: {{'state_dict', 'hyper_parameters'}} or "
        "{'model_state_dict', 'config'}."
    )


def _with_compat(model: tuple[Params, State, Config], compat: Compat | None) -> tuple[Params, State, Config]:
    params, state, cfg = model
    return params, state, cfg if compat is None else cfg.override(f"compat={compat}")
