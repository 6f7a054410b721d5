"""The structure of a tree as plain values for JSON, in which tensors are strings such as ``float32 [512, 80]``.

A flat file of named tensors loses empty branches and the difference between lists and dicts; the structure keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nest_fn.layers.types import Tensor


def tree_spec(tree: Any, path: str = "") -> Any:
    """Describe a tree: nested dicts and lists with a string for each tensor; ``None`` is kept.

    Raises ``ValueError`` for other leaves and for keys that are not strings.
    """
    if isinstance(tree, Mapping):
        for name in tree:
            if not isinstance(name, str):
                raise ValueError(f"tree: '{path}' has the key {name!r}; keys are texts.")
        return {name: tree_spec(child, _below(path, name)) for name, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [tree_spec(child, _below(path, str(index))) for index, child in enumerate(tree)]
    if isinstance(tree, Tensor):
        return describe(tree)
    if tree is None:
        return None
    raise ValueError(f"tree: '{path}' is a {type(tree).__name__}; leaves are tensors, other values belong into meta.")


def leaves_of(tree: Any) -> dict[str, Tensor]:
    """Tensors by dotted path. Raises ``ValueError`` if two have the same path because a key contains a dot."""
    leaves: dict[str, Tensor] = {}
    for path, leaf in _walk(tree, ""):
        if path in leaves:
            raise ValueError(f"tree: '{path}' names two leaves; rename the key that holds a dot.")
        leaves[path] = leaf
    return leaves


def rebuild(structure: Any, leaves: Mapping[str, Tensor], path: str = "") -> Any:
    """Rebuild a tree from the results of ``tree_spec`` and ``leaves_of``.

    Raises ``ValueError`` naming the first tensor that is missing or not as described.
    """
    if isinstance(structure, dict):
        return {name: rebuild(child, leaves, _below(path, name)) for name, child in structure.items()}
    if isinstance(structure, list):
        return [rebuild(child, leaves, _below(path, str(index))) for index, child in enumerate(structure)]
    if structure is None:
        return None
    if path not in leaves:
        raise ValueError(f"'{path}' is missing; it should be {structure}")
    if describe(leaves[path]) != structure:
        raise ValueError(f"'{path}' is {describe(leaves[path])}, it should be {structure}")
    return leaves[path]


def describe(leaf: Tensor) -> str:
    """Dtype and shape of a tensor as a string: ``float32 [512, 80]``."""
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"


def _walk(tree: Any, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = [(str(index), child) for index, child in enumerate(tree)]
    else:
        return [] if tree is None else [(path, tree)]
    return [pair for name, child in items for pair in _walk(child, _below(path, name))]


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
