"""Arguments go in and come out of a call bit by bit as they were; the new state is new."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.layers.tree import flatten, tree_map

from .registry import ALL, Example, key, model


def snapshot(*trees: Any) -> list[dict[str, torch.Tensor]]:
    return [{path: leaf.clone() for path, leaf in flatten(tree).items()} for tree in trees]


def check(example: Example, train: bool) -> None:
    arguments = (example.params, example.state, dict(example.inputs), key(3))
    before = snapshot(*arguments)
    result = example.run(*arguments, train)
    for old, new in zip(before, snapshot(*arguments), strict=True):
        assert old.keys() == new.keys()
        for path in old:
            assert torch.equal(old[path], new[path]), f"{example.name} wrote to {path}"
    if train and example.coupled_rows:
        given = {leaf.data_ptr() for leaf in flatten(example.state).values()}
        new = result.state.get("encoder", result.state)
        made = {leaf.data_ptr() for leaf in flatten(new).values()}
        assert not given & made, "the new state shares memory with the old one"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("example", ALL, ids=repr)
def test_arguments_stay_as_they_are(example: Example, train: bool) -> None:
    check(example, train)


def test_arguments_of_the_model_stay_as_they_are() -> None:
    check(model(), True)


@pytest.mark.parametrize("example", [one for one in ALL if not one.coupled_rows], ids=repr)
def test_state_passes_through(example: Example) -> None:
    """Where nothing is remembered, the state that comes out is the one that went in."""
    out = example.run(example.params, example.state, example.inputs, key(3), True).state
    assert tree_map(lambda leaf: leaf, out) == out
    assert {p: leaf.data_ptr() for p, leaf in flatten(out).items()} == {
        p: leaf.data_ptr() for p, leaf in flatten(example.state).items()
    }


def test_the_law_fires() -> None:
    """A layer that writes to its argument is found out."""

    def careless(p: Any, s: Any, i: Any, k: Any, train: bool) -> Any:
        return i["x"].mul_(2.0)

    with pytest.raises(AssertionError, match="wrote to x"):
        check(Example("careless", careless, inputs={"x": torch.ones(3)}), True)
