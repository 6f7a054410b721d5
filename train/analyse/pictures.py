"""Draws pictures with matplotlib, the extra ``analysis``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nest_fn.extras import load_extra
from nest_fn.files.atomic import anything, atomic_write

from .result import Picture


def draw(picture: Picture, path: Path) -> None:
    """Write the picture as PNG. Raises ``ImportError``, one line, without matplotlib."""
    load_extra("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    _KINDS[picture.kind](figure, axes, picture)
    axes.set_title(picture.title)
    axes.set_xlabel(picture.x_label)
    axes.set_ylabel(picture.y_label)
    with atomic_write(path, 0, replaces=anything) as temporary, open(temporary, "wb") as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _lines(_: Any, axes: Any, picture: Picture) -> None:
    if all(isinstance(value, int) for value in picture.x):
        _whole_ticks(axes.xaxis)
    for label, values in picture.series.items():
        axes.plot(picture.x, values, label=label, marker="o" if len(picture.x) <= 40 else None, markersize=4)
    axes.grid(alpha=0.3)
    if len(picture.series) > 1:
        axes.legend(frameon=False)


def _points(_: Any, axes: Any, picture: Picture) -> None:
    for label, values in picture.series.items():
        axes.scatter(picture.x, values, label=label, s=14, alpha=0.7)
    axes.grid(alpha=0.3)


def _bars(_: Any, axes: Any, picture: Picture) -> None:
    values = next(iter(picture.series.values()))
    axes.bar(range(len(values)), values)
    axes.set_xticks(range(len(values)), [str(name) for name in picture.x], rotation=45, ha="right")


def _map(figure: Any, axes: Any, picture: Picture) -> None:
    image = axes.imshow(list(picture.series.values()), origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=axes)
    _whole_ticks(axes.xaxis)
    _whole_ticks(axes.yaxis)


_KINDS = {"lines": _lines, "points": _points, "bars": _bars, "map": _map}
