"""Values as messages quote them: one line, printable, and short, whatever came."""

from __future__ import annotations

WIDTH = 80  # characters that a value may take
_PATH = 4200  # characters of the longest path there is, and some


def shown(value: object, width: int = WIDTH) -> str:
    """``repr`` of a value, its middle left out where it is long."""
    if isinstance(value, str) and len(value) > 4 * width:  # no copy of a huge text is made
        value = value[: 2 * width] + value[-2 * width :]
    return clip(repr(value), width)


def clip(text: str, width: int = WIDTH) -> str:
    """A text of at most ``width`` characters: of a long one the beginning and the end."""
    if len(text) <= width:
        return text
    half = (width - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def printable(text: str, width: int = _PATH) -> str:
    """A text for a terminal: control characters and lone surrogates escaped, each line clipped."""
    return "\n".join(clip("".join(map(_escaped, line)), width) for line in text[: 32 * width].split("\n"))


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() or letter == "\t" else repr(letter)[1:-1]
