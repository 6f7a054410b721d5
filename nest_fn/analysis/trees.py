"""Trees of parameters as vectors: inner product, sum, random direction, one flat tensor and back."""

from __future__ import annotations

from typing import Any

import torch

from nest_fn.layers import random
from nest_fn.layers.tree import fill, flatten, tree_map
from nest_fn.layers.types import Key, Tensor


def dot(a: Any, b: Any) -> Tensor:
    """Inner product of two trees of one structure, summed in float64: a scalar ``[]``."""
    pairs = zip(flatten(a).values(), flatten(b).values(), strict=True)
    return torch.stack([torch.sum(x * y, dtype=torch.float64) for x, y in pairs]).sum()


def norm(tree: Any) -> Tensor:
    """Euclidean norm of a tree: a float64 scalar ``[]``."""
    return dot(tree, tree).sqrt()


def add_scaled(a: Any, b: Any, factor: float | Tensor) -> Any:
    """``a + factor * b``, leaf by leaf, in the dtype of ``a``; ``factor`` is a number or a scalar ``[]``."""
    return tree_map(lambda x, y: x + (factor * y).to(x.dtype), a, b)


def scaled(tree: Any, factor: float | Tensor) -> Any:
    """``factor * tree``, in the dtype of each leaf; ``factor`` is a number or a scalar ``[]``."""
    return tree_map(lambda x: (x * factor).to(x.dtype), tree)


def normal_like(key: Key, tree: Any) -> Any:
    """A tree of standard normal draws from a key ``[2]``, each leaf in the shape and dtype of ``tree``'s."""
    leaves = flatten(tree)
    keys = random.split(key, len(leaves)).to(key.device)
    drawn = {
        path: random.normal(keys[index], leaf.shape, torch.float64).to(leaf.dtype)
        for index, (path, leaf) in enumerate(leaves.items())
    }
    return fill(tree, drawn)


def to_vector(tree: Any) -> Tensor:
    """All leaves, one after the other: ``[P]``."""
    return torch.cat([leaf.reshape(-1) for leaf in flatten(tree).values()])


def from_vector(vector: Tensor, like: Any) -> Any:
    """The inverse of ``to_vector``: ``[P]`` -> a tree of the structure, shapes and dtypes of ``like``.

    Raises ``ValueError`` if the number of elements differs.
    """
    leaves = flatten(like)
    sizes = [leaf.numel() for leaf in leaves.values()]
    if vector.ndim != 1 or vector.shape[0] != sum(sizes):
        raise ValueError(f"from_vector: the tree has {sum(sizes)} elements, the vector is {list(vector.shape)}.")
    pieces = vector.split(sizes)
    filled = {
        path: piece.view(leaf.shape).to(leaf.dtype) for (path, leaf), piece in zip(leaves.items(), pieces, strict=True)
    }
    return fill(like, filled)
