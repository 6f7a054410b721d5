"""Pictures as inline SVG, drawn by matplotlib (extra ``report``) without its global state.

Letters stay letters, so that a picture takes the page's font and its text can be searched. Only identifiers that are
referred to are kept; ``page.page`` makes them unique.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nest_fn.extras import load_extra
from nest_fn.train.errors import UsageError

COLOURS = ("#1f5fa8", "#c4501b", "#2d8a4e", "#8a4fa3", "#a8862a", "#3a9aa8", "#b03a5b", "#5f6b78")
"""Of the runs or arms of a page, in order; they differ in lightness too."""
GUESS = "#8a8f98"  # of bounds and guesses
_STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.0, "axes.titlesize": 9.5,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": "#40464f", "xtick.color": "#40464f", "ytick.color": "#40464f", "axes.grid": True,
    "grid.color": "#e3e6ea", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 8.0, "lines.linewidth": 1.4, "axes.linewidth": 0.7, "figure.constrained_layout.use": True,
}  # fmt: skip


@contextmanager
def drawing(width: float = 5.0, height: float = 2.8) -> Iterator[Any]:
    """A matplotlib figure of so many inches, in the page's style. Raises ``UsageError`` where matplotlib is missing."""
    try:
        figures = load_extra("matplotlib.figure")
        matplotlib = load_extra("matplotlib")
    except ImportError as error:
        raise UsageError(f"report: {error}") from error
    with matplotlib.rc_context(_STYLE):
        yield figures.Figure(figsize=(width, height))


def to_svg(figure: Any, label: str) -> str:
    """The figure as an ``<svg>`` element as wide as its place; ``label`` says what it shows."""
    matplotlib = load_extra("matplotlib")
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "nest_fn"}), io.StringIO() as text:
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None, "matplotlib wrote an SVG without a viewBox"
    drawn = re.sub(r"<svg[^>]*>", f'<svg {box[0]} role="img" aria-label="{html.escape(label)}">', drawn, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', drawn))
    return re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", drawn)
