"""Values as messages quote them: one line, printable, and short, whatever came."""

from __future__ import annotations

import re

_WITHIN = re.compile(r"\n(?!  )")
WIDTH = 80  # characters that a value may take
_LINE = 1000  # characters of a message's line


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


def printable(text: str, width: int = _LINE) -> str:
    """A message for a terminal: control characters and lone surrogates escaped, each line clipped.

    A new line stays where an item of a list begins, two spaces in; one within a name is escaped.
    """
    lines = _WITHIN.sub(r"\\n", text).split("\n")
    return "\n".join(clip("".join(map(_escaped, line)), width) for line in lines)


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else repr(letter)[1:-1]
