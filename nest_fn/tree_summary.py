"""A table of the tensors in a tree: names, shapes, dtypes and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from .files.tree_spec import tree_spec
from .layers.tree import flatten
from .layers.types import Tensor


class _Row(NamedTuple):
    """One leaf, or the leaves of the same name in ``times`` equal layers."""

    path: str
    leaf: Tensor
    times: int

    def cells(self) -> tuple[str, ...]:
        shape = str(list(self.leaf.shape))
        count, size = self.times * self.leaf.numel(), self.times * self.leaf.numel() * self.leaf.element_size()
        dtype = str(self.leaf.dtype).removeprefix("torch.")
        return (self.path, f"{self.times} x {shape}" if self.times > 1 else shape, dtype, f"{count:,}", f"{size:,}")


def summary(params: Mapping[str, Any]) -> str:
    """A table of a tree: path, shape, dtype, number of elements and bytes of each leaf, of each part and in total.

    ``params`` is any nested dict of tensors: params, state, ``{"params": params, "state": state}``, or the trees of
    ``abstract(cfg)``, which allocate nothing. Neighbouring equal layers of a list share their rows
    (``encoder.layers.0-16``). Raises ``TypeError`` if it is no dict, or if a leaf is no tensor.
    """
    _check(params)
    rows = [row.cells() for row in _rows(params, "", 1)]
    parts = [("total", params)] if len(params) < 2 else [*params.items(), ("total", params)]
    totals = [(str(name), "", "", *_sizes(tree)) for name, tree in parts]
    return _aligned([("path", "shape", "dtype", "elements", "bytes"), None, *rows, None, *totals])


def _check(tree: Any) -> None:
    if not isinstance(tree, Mapping):
        raise TypeError(f"summary: params is a {type(tree).__name__}; pass a nested dict of tensors, as init makes it.")
    for path, leaf in flatten(tree).items():
        if not isinstance(leaf, Tensor):
            raise TypeError(f"summary: '{path[:200]}' is a {type(leaf).__name__}; leaves must be tensors.")


def _rows(tree: Any, path: str, times: int) -> Iterator[_Row]:
    """The leaves below ``path`` in order, each standing for ``times`` equal ones."""
    if isinstance(tree, Tensor):
        yield _Row(path, tree, times)
        return
    start = f"{path}." if path else ""
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _rows(child, f"{start}{name}", times)
        return
    for _, group in groupby(enumerate(tree), key=lambda item: tree_spec(item[1])):
        equal = list(group)
        first, last = equal[0][0], equal[-1][0]
        numbers = str(first) if first == last else f"{first}-{last}"
        yield from _rows(equal[0][1], f"{start}{numbers}", times * len(equal))


def _sizes(tree: Any) -> tuple[str, str]:
    """Elements and bytes of all leaves."""
    leaves = flatten(tree).values()
    count = sum(leaf.numel() for leaf in leaves)
    return f"{count:,}", f"{sum(leaf.numel() * leaf.element_size() for leaf in leaves):,}"


def _aligned(lines: list[tuple[str, ...] | None]) -> str:
    """Columns of equal width, texts to the left and numbers to the right; ``None`` is a rule."""
    cells = [line for line in lines if line is not None]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def text(line: tuple[str, ...]) -> str:
        left = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        return "  ".join([*left, *right])

    return "\n".join(rule if line is None else text(line) for line in lines)
