"""Trees: map, flatten, unflatten, fill, compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nest_fn.layers.tree import check_same, count, fill, flatten, tree_map, unflatten

NAMES = st.text("abcdef_", min_size=1, max_size=4)
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.integers(),
        lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3),
        max_leaves=12,
    ),
)


@given(TREES)
def test_unflatten_is_the_inverse_of_flatten(tree: dict[str, Any]) -> None:
    assert unflatten(flatten(tree)) == tree


@given(TREES)
def test_fill_and_map_keep_the_structure(tree: dict[str, Any]) -> None:
    assert fill(tree, flatten(tree)) == tree
    assert tree_map(lambda leaf: leaf, tree) == tree
    assert flatten(tree_map(lambda a, b: a + b, tree, tree)) == {path: 2 * leaf for path, leaf in flatten(tree).items()}


def test_flatten_names_paths_in_the_order_of_the_tree() -> None:
    tree = {"b": [{"w": 1}, {"w": 2}], "a": 3, "empty": {}}
    assert list(flatten(tree).items()) == [("b.0.w", 1), ("b.1.w", 2), ("a", 3)]


def test_fill_keeps_empty_branches() -> None:
    assert fill({"a": {}, "b": [1]}, {"b.0": 5}) == {"a": {}, "b": [5]}


def test_lists_of_ten_and_more_stay_in_order() -> None:
    tree = {"layers": list(range(12))}
    assert unflatten(flatten(tree)) == tree
    assert unflatten({"x.1": 1, "x.0": 0}) == {"x": [0, 1]}
    assert unflatten({"x.1": 1, "x.2": 2}) == {"x": {"1": 1, "2": 2}}


def test_tree_map_refuses_lists_of_other_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        tree_map(lambda a, b: a, {"a": [1, 2]}, {"a": [1]})


@pytest.mark.parametrize("leaves", [{"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}])
def test_a_path_cannot_be_the_beginning_of_another(leaves: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must not be each other's beginning"):
        unflatten(leaves)


def test_count() -> None:
    assert count({"a": torch.zeros(2, 3), "b": [torch.zeros(())]}) == 7


@pytest.mark.parametrize(
    "given_tree,message",
    [
        ({"a": {"w": torch.zeros(2)}}, r"params: 'b' is missing; it should be float32 \[3\]"),
        (
            {"a": {"w": torch.zeros(4)}, "b": torch.zeros(3)},
            r"params: 'a.w' is float32 \[4\], it should be float32 \[2\]",
        ),
        (
            {"a": {"w": torch.zeros(2).double()}, "b": torch.zeros(3)},
            r"params: 'a.w' is float64 \[2\], it should be float32",
        ),
        ({"a": {"w": torch.zeros(2), "x": 1}, "b": torch.zeros(3)}, r"params: 'a.x' is not wanted here \(1 such\)"),
    ],
)
def test_check_same_names_the_first_difference(given_tree: dict[str, Any], message: str) -> None:
    wanted = {"a": {"w": torch.zeros(2)}, "b": torch.zeros(3)}
    check_same("params", wanted, wanted)
    with pytest.raises(ValueError, match=message):
        check_same("params", given_tree, wanted)


def test_a_dict_of_numbers_is_no_list() -> None:
    """Their dotted paths are equal."""
    listed = {"a": {}, "layers": [{"w": torch.zeros(2)}, {"w": torch.zeros(2)}]}
    named = {"a": {}, "layers": {str(index): layer for index, layer in enumerate(listed["layers"])}}
    assert flatten(listed).keys() == flatten(named).keys()
    check_same("params", {"layers": tuple(listed["layers"])}, listed)
    with pytest.raises(ValueError, match="^params: 'layers' is a dict, it should be a list$"):
        check_same("params", named, listed)
    with pytest.raises(ValueError, match=r"^params: 'x\.layers' is a list, it should be a dict$"):
        check_same("params", {"x": listed}, {"x": named})
