"""Nested dicts and lists of tensors: map, flatten to dotted paths, unflatten, compare with a readable error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .types import Tensor


def device_of(tree: Any) -> torch.device:
    """The device of a tree's first leaf; the CPU if the tree is empty."""
    return next((leaf.device for leaf in flatten(tree).values()), torch.device("cpu"))


def tree_map(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply ``f`` to the corresponding leaves of one or more trees of one structure; returns the tree of results."""
    if isinstance(tree, Mapping):
        return {name: tree_map(f, child, *(other[name] for other in others)) for name, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [tree_map(f, *children) for children in zip(tree, *others, strict=True)]
    return f(tree, *others)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path, in order: ``{"a": [{"w": x}]} -> {"a.0.w": x}``. Empty branches are dropped."""
    if isinstance(tree, Mapping):
        items = [(str(name), child) for name, child in tree.items()]
    elif isinstance(tree, (list, tuple)):
        items = [(str(index), child) for index, child in enumerate(tree)]
    else:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for name, child in items:
        leaves.update(flatten(child, f"{prefix}.{name}" if prefix else name))
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``; a branch whose names are the numbers 0..n-1 becomes a list.

    Raises ``ValueError`` if one path is a prefix of another.
    """
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = root
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"unflatten: '{path}' passes through a leaf; paths must not be each other's beginning")
        if last in node:
            raise ValueError(
                f"unflatten: '{path}' is both a leaf and a branch; paths must not be each other's beginning"
            )
        node[last] = leaf
    made = _lists(root)
    return made if isinstance(made, dict) else {str(index): child for index, child in enumerate(made)}


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {name: _lists(child) for name, child in node.items()}
    if children and all(name.isdecimal() for name in children):
        order = sorted(children, key=int)
        if order == [str(index) for index in range(len(order))]:
            return [children[name] for name in order]
    return children


def check_same(what: str, given: Any, wanted: Any) -> None:
    """Raise ``ValueError`` naming the first path at which two trees differ in structure, shape or dtype."""
    have, want = flatten(given), flatten(wanted)
    for path, leaf in want.items():
        if path not in have:
            raise ValueError(f"{what}: '{path}' is missing; it should be {_describe(leaf)}")
        if isinstance(leaf, Tensor) and (have[path].shape != leaf.shape or have[path].dtype != leaf.dtype):
            raise ValueError(f"{what}: '{path}' is {_describe(have[path])}, it should be {_describe(leaf)}")
    extra = [path for path in have if path not in want]
    if extra:
        raise ValueError(
            f"{what}: '{extra[0]}' is not wanted here ({len(extra)} such); is this tree of another config?"
        )
    mismatch = kind_mismatch(given, wanted)
    if mismatch:
        raise ValueError(f"{what}: {mismatch}")


def kind_mismatch(given: Any, wanted: Any, path: str = "") -> str | None:
    """For two trees with the same paths: where one has a list and the other a dict, as a message; None if nowhere."""
    if not isinstance(wanted, Mapping | list | tuple):
        return None
    if isinstance(given, Mapping) != isinstance(wanted, Mapping):
        have, want = (("dict" if isinstance(tree, Mapping) else "list") for tree in (given, wanted))
        return f"'{path}' is a {have}, it should be a {want}"
    for name, child in wanted.items() if isinstance(wanted, Mapping) else enumerate(wanted):
        if flatten(child):  # an empty branch has no path
            found = kind_mismatch(given[name], child, f"{path}.{name}" if path else str(name))
            if found:
                return found
    return None


def _describe(leaf: Any) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def count(tree: Any) -> int:
    """Number of elements in all tensors of a tree."""
    return sum(leaf.numel() for leaf in flatten(tree).values())


def fill(tree: Any, leaves: Mapping[str, Any], prefix: str = "") -> Any:
    """A tree of the same structure, empty branches included, with the leaves replaced by those of ``leaves``."""
    at = f"{prefix}." if prefix else ""
    if isinstance(tree, Mapping):
        return {name: fill(child, leaves, f"{at}{name}") for name, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [fill(child, leaves, f"{at}{index}") for index, child in enumerate(tree)]
    return leaves[prefix]


def global_norm(leaves: Mapping[str, Tensor]) -> Tensor:
    """Root of the sum of squares of all leaves ``[...]``: a float32 (or float64) scalar ``[]``."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(leaves.values()))))
