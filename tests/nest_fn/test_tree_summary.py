"""``summary``: a tree's leaves, parts and totals as a table."""

from __future__ import annotations

import pytest
import torch

import nest_fn
from nest_fn import Config, summary
from nest_fn.layers.tree import count


def test_a_small_table() -> None:
    layer = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3, dtype=torch.float64)}
    tree = {"encoder": {"layers": [layer, layer, {"weight": torch.zeros(2, 2)}]}, "scale": torch.tensor(1)}
    assert summary(tree).splitlines() == [
        "path                       shape       dtype    elements  bytes",
        "---------------------------------------------------------------",
        "encoder.layers.0-1.weight  2 x [3, 2]  float32        12     48",
        "encoder.layers.0-1.bias    2 x [3]     float64         6     48",
        "encoder.layers.2.weight    [2, 2]      float32         4     16",
        "scale                      []          int64           1      8",
        "---------------------------------------------------------------",
        "encoder                                               22    112",
        "scale                                                  1      8",
        "total                                                 23    120",
    ]


def test_layers_between_unequal_ones_are_not_folded_together() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    paths = [line.split()[0] for line in summary({"x": [a, b, a, a]}).splitlines()]
    assert paths[2:5] == ["x.0", "x.1", "x.2-3"]


def test_nested_lists_multiply() -> None:
    block = [torch.zeros(2), torch.zeros(2)]
    assert "x.0-2.0-1  6 x [2]" in summary({"x": [block, block, block]})


@pytest.mark.parametrize("name", ["tiny", "nest_large"])
def test_totals_are_those_of_the_trees(name: str) -> None:
    params, state = nest_fn.abstract(Config.preset(name))
    table = summary({"params": params, "state": state})
    *_, first, second, total = [line.split() for line in table.splitlines()]
    assert first == ["params", f"{count(params):,}", f"{4 * count(params):,}"]
    assert second[:2] == ["state", f"{count(state):,}"]
    assert total[:2] == ["total", f"{count(params) + count(state):,}"]
    assert len(table.splitlines()) < 75


def test_an_empty_tree_has_a_total_of_nothing() -> None:
    assert summary({}).splitlines()[-1].split() == ["total", "0", "0"]


def test_what_is_no_tree_is_refused() -> None:
    with pytest.raises(TypeError, match="summary: params is a Tensor; pass a nested dict of tensors"):
        summary(torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"summary: 'a\.0' is a int; leaves must be tensors"):
        summary({"a": [3]})
