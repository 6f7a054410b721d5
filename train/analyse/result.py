"""What an analysis finds: a summary for JSON, arrays, and pictures described without drawing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Literal, NamedTuple

from torch import Tensor


class Picture(NamedTuple):
    """A picture to draw: ``lines`` and ``points`` of series over x, ``bars`` by name, or a ``map`` of ``[Y, X]``."""

    name: str
    kind: Literal["lines", "points", "bars", "map"]
    title: str
    x_label: str
    y_label: str
    x: Sequence[Any]  # numbers, or names of bars; of a map the numbers of its columns
    series: Mapping[str, Sequence[float]]  # of a map its rows, by label


class Result(NamedTuple):
    """The findings of one analysis."""

    about: str  # what was measured, in a sentence
    summary: dict[str, Any]  # for JSON
    arrays: dict[str, Tensor]  # for NPZ
    pictures: tuple[Picture, ...] = ()


def plain(value: Any) -> Any:
    """A value as JSON has it: tensors and tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


def rows_of(values: Tensor, labels: Sequence[str] | None = None) -> dict[str, list[float]]:
    """A matrix ``[Y, X]`` as the series of a map."""
    names = [str(index) for index in range(len(values))] if labels is None else list(labels)
    return dict(zip(names, values.tolist(), strict=True))
