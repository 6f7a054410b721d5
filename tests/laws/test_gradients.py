"""Gradients reach every parameter, and agree with finite differences in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.layers import random
from nest_fn.layers.tree import fill, flatten, tree_map

from .registry import ALL, Example, key, model, no_gradient, scalar

LEARNED = [example for example in ALL if flatten(example.params)]


def double(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def gradients(example: Example, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
    """Value, gradients of the parameters and of x, in training."""
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(example.params).items()}
    inputs = dict(example.inputs)
    asked = dict(leaves)
    if "x" in inputs:
        inputs["x"] = asked["x"] = inputs["x"].detach().requires_grad_()
    result = example.run(fill(example.params, leaves), example.state, inputs, key(seed), True)
    value = scalar(example, result)
    grads = dict(zip(asked, torch.autograd.grad(value, list(asked.values()), allow_unused=True), strict=True))
    return value.detach(), {path: grads[path] for path in leaves}, grads.get("x")


def check_reach(example: Example) -> None:
    """The largest gradients of several draws, since stochastic depth may drop a layer."""
    largest: dict[str, float] = {}
    for seed in range(1, 9 if "depth" in example.name else 2):
        for path, grad in gradients(example, seed)[1].items():
            assert grad is not None, f"{path} is cut off"
            assert grad.isfinite().all(), path
            largest[path] = max(largest.get(path, 0.0), float(grad.abs().max()))
    for path, size in largest.items():
        if no_gradient(example, path):
            assert size < 1e-3, f"{path} has a gradient after all"
        else:
            assert size > 1e-6, f"{path} gets no gradient"


def in_float64(example: Example) -> Example:
    return example._replace(
        params=double(example.params), state=double(example.state), inputs=double(dict(example.inputs))
    )


def check_float64(example: Example) -> None:
    """float64 as float32 has it, but for rounding; and the slope along a direction is the gradient's."""
    exact = in_float64(example)
    value, grads, by_x = gradients(exact)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value.float(), gradients(example)[0], atol=1e-4, rtol=1e-4)
    directions = {
        path: random.normal(random.fold_in(key(8), index), leaf.shape, torch.float64)
        for index, (path, leaf) in enumerate(flatten(exact.params).items())
    }
    towards = random.normal(key(9), exact.inputs["x"].shape, torch.float64) if by_x is not None else None

    def moved(step: float) -> torch.Tensor:
        leaves = {path: leaf + step * directions[path] for path, leaf in flatten(exact.params).items()}
        inputs = dict(exact.inputs)
        if towards is not None:
            inputs["x"] = inputs["x"] + step * towards
        return scalar(exact, exact.run(fill(exact.params, leaves), exact.state, inputs, key(1), True))

    slope = sum((grad * directions[path]).sum() for path, grad in grads.items() if grad is not None)
    slope = slope + ((by_x * towards).sum() if by_x is not None else 0.0)
    step = 1e-6
    torch.testing.assert_close((moved(step) - moved(-step)) / (2 * step), slope, atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("example", LEARNED, ids=repr)
def test_gradient_reaches_every_parameter(example: Example) -> None:
    check_reach(example)


@pytest.mark.parametrize("example", ALL, ids=repr)
def test_gradients_are_right(example: Example) -> None:
    check_float64(example)


@pytest.mark.parametrize(
    "overrides", [(), ("masking.freeze=false",), ("mask_position=post_conv", "num_books=2")], ids=str
)
def test_gradient_reaches_every_parameter_of_the_model(overrides: tuple[str, ...]) -> None:
    check_reach(model(*overrides))


@pytest.mark.parametrize("overrides", [(), ("masking.freeze=false",), ("mask_position=post_conv",)], ids=str)
def test_gradients_of_the_model_are_right(overrides: tuple[str, ...]) -> None:
    check_float64(model(*overrides))


def test_the_laws_fire() -> None:
    def cut(p: Any, s: Any, i: Any, k: Any, train: bool) -> Any:
        return type("Result", (), {"y": i["x"] * p["a"] + p["b"].detach(), "lengths": None, "state": {}})

    def wrong(p: Any, s: Any, i: Any, k: Any, train: bool) -> Any:
        return type("Result", (), {"y": i["x"] * p["a"].detach() * p["a"], "lengths": None, "state": {}})

    x = {"x": torch.ones(3)}
    with pytest.raises(AssertionError, match="b is cut off"):
        check_reach(Example("cut", cut, {"a": torch.ones(3), "b": torch.ones(3)}, {}, x))
    with pytest.raises(AssertionError):
        check_float64(Example("wrong", wrong, {"a": torch.ones(3)}, {}, x))
