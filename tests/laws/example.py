"""What a law works on: one call of a layer, with arguments that hide no fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from nest_fn.layers import random
from nest_fn.layers.lengths import valid_mask, zero_padding
from nest_fn.layers.tree import fill, flatten

Tree = Any
B, T, D, H = 3, 13, 8, 2
LENGTHS = (13, 9, 4)


class Result(NamedTuple):
    """What a call makes; ``y`` has rows first and, where there are ``lengths``, then frames."""

    y: torch.Tensor
    lengths: torch.Tensor | None = None
    state: Tree = {}  # noqa: RUF012  (a default of a NamedTuple, never written to)


class Example(NamedTuple):
    """One layer with arguments. ``run(params, state, inputs, key, train)`` is the call."""

    name: str
    run: Callable[..., Result]
    params: Tree = {}  # noqa: RUF012
    state: Tree = {}  # noqa: RUF012
    inputs: Mapping[str, torch.Tensor] = {}
    chance: bool = False  # draws from its key in training
    coupled_rows: bool = False  # in training a row depends on its batch (batch norm)
    padding: bool = True  # valid frames do not depend on padding, in eval
    forward_mode: bool = True  # jvp works
    without_gradient: tuple[str, ...] = ()  # beginnings or ends of paths whose gradient is 0 in exact arithmetic

    def __repr__(self) -> str:
        return self.name


def key(seed: int = 0) -> torch.Tensor:
    return random.key(seed)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return random.normal(key(seed), shape)


def jolt(tree: Tree, seed: int = 5) -> Tree:
    """Every float leaf moved off its initial value, so that zeros and ones cannot hide a fault."""
    moved = {}
    for index, (path, leaf) in enumerate(flatten(tree).items()):
        if leaf.is_floating_point():
            leaf = leaf + 0.3 * random.uniform(random.fold_in(key(seed), index), leaf.shape, leaf.dtype)
        moved[path] = leaf
    return fill(tree, moved)


def frames(width: int = D, seed: int = 1) -> dict[str, torch.Tensor]:
    """x ``[B, T, D]`` with something in its padding, and lengths."""
    return {"x": noise(B, T, width, seed=seed), "lengths": torch.tensor(LENGTHS)}


def scalar(example: Example, result: Result) -> torch.Tensor:
    """One number of a result, with different weights on all valid entries."""
    y = result.y
    if result.lengths is not None:
        y = zero_padding(y, valid_mask(result.lengths, y.shape[1]))
    return (y * torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).cos().reshape(y.shape)).sum()


def no_gradient(example: Example, path: str) -> bool:
    return any(path.startswith(part) or path.endswith(part) for part in example.without_gradient)
