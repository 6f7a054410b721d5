"""``torch.func.vmap`` over examples, keys and stacked parameters equals a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import vmap

from nest_fn.layers import random
from nest_fn.layers.tree import flatten, tree_map

from .registry import ALL, Example, jolt, key, scalar

# The fused attention kernel on CPU is run in a loop, and PyTorch says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop.*_scaled_dot_product:UserWarning")


def stack(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees) if flatten(trees[0]) else trees[0]


CLOSE = 2**8 * torch.finfo(torch.float32).eps  # sums of some hundred terms, in another order


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("example", ALL, ids=repr)
def test_over_examples_and_keys(example: Example, train: bool) -> None:
    """Each row is a batch of its own, with a key of its own."""
    rows = {name: value[:, None] for name, value in example.inputs.items()}
    keys = random.split(key(4), next(iter(rows.values())).shape[0])
    if "lengths" in rows:
        rows["lengths"] = rows["lengths"].clone()

    def one(inputs: Any, k: torch.Tensor) -> torch.Tensor:
        return example.run(example.params, example.state, inputs, k, train).y

    many = vmap(one)(rows, keys)
    loop = [one({name: value[row] for name, value in rows.items()}, keys[row]) for row in range(len(keys))]
    torch.testing.assert_close(many, torch.stack(loop), atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("example", [one for one in ALL if flatten(one.params)], ids=repr)
def test_over_stacked_parameters(example: Example) -> None:
    """An ensemble: parameters, state and keys are stacked, the data are shared."""
    params = [example.params, jolt(example.params, seed=11)]
    states = [example.state, jolt(example.state, seed=12)]
    keys = random.split(key(4), 2)
    has_state = bool(flatten(example.state))

    def one(p: Any, s: Any, k: torch.Tensor) -> torch.Tensor:
        return example.run(p, s, example.inputs, k, True).y

    stacked = (stack(params), stack(states), keys)
    many = vmap(one, in_dims=(0, 0 if has_state else None, 0))(*stacked)
    loop = [one(params[index], states[index], keys[index]) for index in range(2)]
    torch.testing.assert_close(many, torch.stack(loop), atol=CLOSE, rtol=CLOSE)


# PyTorch 2.11 scripts its own forward-mode formulas on first use.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("example", [one for one in ALL if one.forward_mode], ids=repr)
def test_forward_mode_agrees_with_reverse_mode(example: Example) -> None:
    """``jvp`` along a direction of the input is the gradient's product with it."""

    def value(x: torch.Tensor) -> torch.Tensor:
        return scalar(example, example.run(example.params, example.state, {**example.inputs, "x": x}, key(1), True))

    x = example.inputs["x"]
    towards = random.normal(key(9), x.shape)
    _, slope = torch.func.jvp(value, (x,), (towards,))
    torch.testing.assert_close(slope, (torch.func.grad(value)(x) * towards).sum(), atol=1e-4, rtol=1e-4)
