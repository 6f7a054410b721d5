"""How messages quote values: on one line, printable and short, whatever the value."""

from __future__ import annotations

import re

_WITHIN = re.compile(r"\n(?!  )")
WIDTH = 80  # maximum characters of a quoted value
_LINE = 1000  # maximum characters of a line of a message


def shown(value: object, width: int = WIDTH) -> str:
    """``repr`` of a value, with its middle left out if it is long."""
    if isinstance(value, str) and len(value) > 4 * width:  # avoids the repr of a huge string
        value = value[: 2 * width] + value[-2 * width :]
    return clip(repr(value), width)


def clip(text: str, width: int = WIDTH) -> str:
    """Shorten a string to at most ``width`` characters, keeping its beginning and its end."""
    if len(text) <= width:
        return text
    half = (width - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def printable(text: str, width: int = _LINE) -> str:
    """Make a message safe for a terminal: escape control characters and lone surrogates, shorten each line.

    A newline is kept only before a list item, which is indented by two spaces; all others are escaped.
    """
    lines = _WITHIN.sub(r"\\n", text).split("\n")
    return "\n".join(clip("".join(map(_escaped, line)), width) for line in lines)


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else repr(letter)[1:-1]
