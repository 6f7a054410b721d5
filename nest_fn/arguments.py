"""Checks of the arguments of public functions, before anything is computed.

They read Python values only (types, shapes, dtypes), so that they are free in a compiled graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nest_fn.files.quoting import shown
from nest_fn.layers.types import Tensor

from .config import Config
from .config.model import PreprocessorConfig

_ENTRY = {"params": "decoder", "state": "quantizer"}  # an entry that each tree always has and the other never has


def check_config(what: str, cfg: Any) -> None:
    """Raise ``TypeError`` unless ``cfg`` is a ``Config``."""
    if not isinstance(cfg, Config):
        made = f"Config.preset({shown(cfg)})" if isinstance(cfg, str) else "Config.from_yaml(...)"
        raise TypeError(f"{what}: cfg is {_kind(cfg)}; pass a Config, such as {made}.")


def check_preprocessor(what: str, cfg: Any) -> None:
    """Raise ``TypeError`` unless ``cfg`` is a ``PreprocessorConfig``."""
    if not isinstance(cfg, PreprocessorConfig):
        raise TypeError(f"{what}: cfg is {_kind(cfg)}; pass the section preprocessor of a Config, cfg.preprocessor.")


def check_tensor(what: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        hint = "torch.from_numpy(it)" if type(value).__module__ == "numpy" else "torch.as_tensor(it)"
        raise TypeError(f"{what} is {_kind(value)}; pass a tensor, {hint}.")


def check_trees(what: str, cfg: Any, params: Any = None, state: Any = None, *paths: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``cfg`` is a ``Config`` and the trees contain all ``paths``.

    A path starts with the tree's name: ``params.encoder.layers``.
    """
    check_config(what, cfg)
    trees = {"params": params, "state": state}
    for path in paths:
        name, *below = path.split(".")
        _check_tree(what, name, trees[name])
        node = trees[name]
        for part in below:
            if not isinstance(node, Mapping) or part not in node:
                held = ", ".join(map(str, trees[name])) or "nothing"
                raise ValueError(f"{what}: {path} is missing, {name} holds {held}; pass what init or load made.")
            node = node[part]


def _check_tree(what: str, name: str, tree: Any) -> None:
    if not isinstance(tree, Mapping):
        raise TypeError(f"{what}: {name} is {_kind(tree)}; pass the nested dict that init or load made.")
    other = "state" if name == "params" else "params"
    if _ENTRY[other] in tree and _ENTRY[name] not in tree:
        raise ValueError(f"{what}: {name} holds {_ENTRY[other]}, as {other} does; pass params first and state second.")


def _kind(value: Any) -> str:
    return f"the text {shown(value)}" if isinstance(value, str) else f"a {type(value).__name__}"
