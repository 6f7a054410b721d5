"""Columns of a million strings or numbers in little more memory than their characters or digits take.

A column under construction is one growing piece of memory: many small arrays, joined at the end, would take it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

_ROWS = 4096  # strings that are decoded at a time


class TextColumn(Sequence[str]):
    """An immutable sequence of strings: ``data[end[i - 1]:end[i]]`` is string ``i`` in UTF-8, lone surrogates kept."""

    def __init__(self, data: NDArray[np.uint8], end: NDArray[Any]) -> None:
        self._data, self._end = data, end

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextColumn:
        """The column of these strings."""
        builder, remaining = TextBuilder(), iter(texts)
        while block := list(islice(remaining, _ROWS)):
            builder.extend(block)
        return builder.column()

    def __len__(self) -> int:
        return len(self._end)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        first = int(self._end[number - 1]) if number else 0
        return _decoded(self._data[first : int(self._end[number])])

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _ROWS):
            yield from self.block(first, first + _ROWS)

    def block(self, first: int, last: int) -> list[str]:
        """Strings ``first`` to ``last - 1``, faster than one by one."""
        end = self._end[first:last].tolist()
        if not end:
            return []
        begin = int(self._end[first - 1]) if first else 0
        data = self._data[begin : end[-1]]
        text = _decoded(data)
        places = zip([begin, *end], end, strict=False)
        if len(text) == len(data):  # ASCII: characters lie where their bytes do
            return [text[start - begin : stop - begin] for start, stop in places]
        return [_decoded(data[start - begin : stop - begin]) for start, stop in places]

    def take(self, indices: NDArray[np.int64]) -> TextColumn:
        """The column of the strings with these indices, in this order."""
        begin = np.where(indices > 0, self._end[indices - 1], 0).astype(np.int64)
        size = self._end[indices].astype(np.int64) - begin
        end = np.cumsum(size)
        data = np.empty(int(end[-1]) if len(end) else 0, np.uint8)
        for first in range(0, len(indices), _ROWS):
            rows = slice(first, first + _ROWS)
            start = int(end[first - 1]) if first else 0
            within = np.arange(start, int(end[rows][-1])) + np.repeat(begin[rows] - end[rows] + size[rows], size[rows])
            data[start : start + len(within)] = self._data[within]
        return TextColumn(data, compact(end))


class TextBuilder:
    """Collects the strings of a ``TextColumn``."""

    def __init__(self) -> None:
        self._data, self._end = bytearray(), NumberBuilder(np.int64)

    def __len__(self) -> int:
        return len(self._end)

    def extend(self, texts: list[str]) -> None:
        """Add strings at the end."""
        data = "".join(texts).encode("utf-8", "surrogatepass")
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        if int(sizes.sum()) != len(data):  # not ASCII alone
            sizes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], np.int64)
        self._end.extend(np.cumsum(sizes) + len(self._data))
        self._data += data

    def column(self) -> TextColumn:
        """The column of all strings added; nothing can be added afterwards."""
        return TextColumn(np.frombuffer(self._data, np.uint8), self._end.column())


class NumberBuilder:
    """Collects the numbers of a column of one type."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype, self._data = np.dtype(dtype), bytearray()

    def __len__(self) -> int:
        return len(self._data) // self._dtype.itemsize

    def extend(self, numbers: ArrayLike) -> None:
        """Add numbers at the end."""
        self._data += np.asarray(numbers, self._dtype).tobytes()

    def column(self) -> NDArray[Any]:
        """All numbers added, made ``compact``; nothing can be added afterwards."""
        return compact(np.frombuffer(self._data, self._dtype))


def compact(column: NDArray[Any]) -> NDArray[Any]:
    """Equal numbers in less memory: one that is seen repeatedly if all are equal, 32 bits where 64 are not needed."""
    if len(column) and (column == column[0]).all():
        return np.broadcast_to(column[:1].copy(), column.shape)
    fits = column.dtype == np.int64 and len(column) and column.min() >= 0 and column.max() < 1 << 32
    return column.astype(np.uint32) if fits else column


def half_units(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Half a unit of the last decimal of each number, of which 1 to 5 are told apart; 0 for more, and for 0 and NaN.

    12.5 was written as 12.5 or 12.50: what was rounded to it is 12.45 to 12.55. Whole numbers count as 12.0.
    """
    found = np.zeros(len(numbers), np.float32)
    for first in range(0, len(numbers), _ROWS):
        rows = numbers[first : first + _ROWS]
        for decimals in range(5, 0, -1):
            found[first : first + _ROWS][np.abs(np.round(rows, decimals) - rows) < 1e-9] = 0.5 * 10.0**-decimals
    found[numbers == 0] = 0
    return found


def _decoded(data: NDArray[np.uint8]) -> str:
    return data.tobytes().decode("utf-8", "surrogatepass")
