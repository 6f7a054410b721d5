"""Types of command-line options, for argparse's ``type=``; each has an error message for the values it rejects.

An invalid option ends the command with one line that names the option, before any file is read or written.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any, NoReturn

from nest_fn.files.quoting import clip, shown
from nest_fn.train.errors import UsageError

from .examples import EXAMPLES

SEEDS = (-(2**63), 2**64 - 1)  # smallest and largest seed of ``nest_fn.key``
_DIGITS = 40  # longest text that is parsed as a number


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add ``--overwrite``, which is the same for all commands that write files."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier call wrote there, and nothing else"
    )


class Help(argparse.RawDescriptionHelpFormatter):
    """A help formatter that shows every default except None, False and an empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        hidden = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        return text if text is None or hidden or "default" in text else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser that raises ``UsageError``, so that its errors end like all others: one line, exit code 2.

    The help of each command ends with its example.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Help} | settings)
        example = EXAMPLES.get(self.prog.partition(" ")[2])
        if example is not None:
            self.epilog = f"example:\n  {example}"

    def format_help(self) -> str:
        """The help, which says where the keys of a config are listed if the command takes any."""
        text = super().format_help()
        takes_keys = any(action.metavar == "KEY=VALUE" for action in self._actions)
        return text + (
            "\nkeys: nest-fn config keys [PATTERN] lists all, or those that a word names\n" if takes_keys else ""
        )

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Reject a lone ``--`` as a value; argparse would turn it into an empty list."""
        values = super()._get_values(action, arg_strings)
        if action.nargs is None and values == []:
            name = "/".join(action.option_strings) or action.dest
            self.error(f"argument {name}: want a value, got '--'")
        return values

    def error(self, message: str) -> NoReturn:
        """Raise ``UsageError``."""
        raise UsageError(f"{self.prog}: {clip(message, 400)}; see {self.prog} --help")


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A type for whole numbers from ``low`` to ``high``."""

    def read(text: str) -> int:
        try:
            number = int(text) if len(text) <= _DIGITS else None
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise _refused(f"want a whole number from {low} to {high}", text)
        return number

    return read


def seed(text: str) -> int:
    """A seed of ``nest_fn.key``: a whole number of at most 64 bits."""
    return whole(*SEEDS)(text)


def positive(unit: str, high: float) -> Callable[[str], float]:
    """A type for numbers above 0 and at most ``high``, in ``unit``."""

    def read(text: str) -> float:
        number = _number(text)
        if number is None or not 0 < number <= high:
            raise _refused(f"want a number of {unit} above 0 and at most {high:g}", text)
        return number

    return read


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    number = _number(text)
    if number is None or not 0 <= number <= 1:
        raise _refused("want a number from 0 to 1", text)
    return number


def whole_or_all(low: int) -> Callable[[str], int | str]:
    """A type for whole numbers from ``low``, or ``all``."""

    def read(text: str) -> int | str:
        return text if text == "all" else whole(low)(text)

    return read


def layer(text: str) -> int | str:
    """A layer's number, or ``weighted``."""
    return text if text == "weighted" else whole(-(2**31))(text)


def layers(text: str) -> list[int] | None:
    """``all`` (None), ``last``, or layer indices as ``0,3,-1``, whose range is checked once the model is loaded."""
    if text in ("all", "last"):
        return None if text == "all" else [-1]
    try:
        return [whole(-(2**31))(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise _refused("want all, last, or numbers of layers as 0,3,-1", text) from None


def weights(text: str) -> list[float]:
    """Finite numbers, one per layer, such as ``0.2,0.8``."""
    numbers = [_number(part) for part in text.split(",")]
    found = [number for number in numbers if number is not None]
    if len(found) < len(numbers):
        raise _refused("want finite numbers, one a layer, as 0.2,0.8", text)
    return found


def path(text: str) -> str:
    """A valid path of a file or folder."""
    try:
        fits = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # a lone surrogate
        fits = False
    if not fits:
        raise _refused("want the name of a file or a folder", text)
    return text


def key(text: str) -> str:
    """A nonempty, printable name."""
    if not text.strip() or not text.isprintable():
        raise _refused("want a name", text)
    return text


def channel(text: str) -> str | int:
    """``error``, ``mix``, ``first``, or the index of one channel."""
    if text in ("error", "mix", "first"):
        return text
    try:
        return whole(0, 1023)(text)
    except argparse.ArgumentTypeError:
        raise _refused("want error, mix, first, or an index from 0", text) from None


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        number = float(text) if len(text) <= _DIGITS else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _refused(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{expected}, got {shown(text)}")
