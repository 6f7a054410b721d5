"""The reporter of the command line: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from nest_fn.train.run.record.sentences import bar, sentence

from .stream import Console


def fit_line(drawn: str, text: str, columns: int) -> str:
    """The bar and its text, cut to one terminal line, since a longer one cannot be overwritten.

    If both do not fit, the bar is dropped first, then the end of the text.
    """
    whole = f"{drawn} {text}"
    return whole if len(whole) < columns else text[: max(columns - 1, 0)]


class ConsoleReporter:
    """Prints a run's messages; on a terminal the last line is a progress bar, which is overwritten. Never raises."""

    def __init__(self, out: TextIO | None = None, clock: Any = time.monotonic) -> None:
        self.console = Console(out if out is not None else sys.stderr)
        self.clock = clock
        self.first: tuple[int, float] | None = None  # step and time of the first report

    def say(self, text: str) -> None:
        """Print an information line."""
        self._line(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._line(f"warning: {text}")

    def progress(self, step: int, total: int, values: Mapping[str, Any]) -> None:
        """Print one line per report; validation results and the last step stay on the screen."""
        text = sentence(values, total, self._eta(step, total))
        if self.console.terminal and "valid" not in values and step < total:
            self.console.write(f"\r\033[K{fit_line(bar(step, total), text, self.console.columns)}")
        else:
            self._line(text)

    def _eta(self, step: int, total: int) -> float | None:
        now = self.clock()
        if self.first is None:
            self.first = (step, now)
            return None
        done = step - self.first[0]
        return (now - self.first[1]) / done * (total - step) if done > 0 else None

    def _line(self, text: str) -> None:
        self.console.write(("\r\033[K" if self.console.terminal else "") + text + "\n")
