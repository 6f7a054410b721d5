"""The reporter of the command line: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from nest_fn.train.run.record.sentences import bar, sentence

from .stream import Console


def fitted(drawn: str, text: str, columns: int) -> str:
    """A bar and its words in one line, for a longer one would not be written over: the bar goes first, then the end."""
    whole = f"{drawn} {text}"
    return whole if len(whole) < columns else text[: max(columns - 1, 0)]


class ConsoleReporter:
    """Prints what a run tells; on a terminal the last line is a bar that is written over. Never raises."""

    def __init__(self, out: TextIO | None = None, clock: Any = time.monotonic) -> None:
        self.console = Console(out if out is not None else sys.stderr)
        self.clock = clock
        self.first: tuple[int, float] | None = None  # step and time of the first report

    def say(self, text: str) -> None:
        """A line of information."""
        self._line(text)

    def warn(self, text: str) -> None:
        """A line that asks for attention."""
        self._line(f"warning: {text}")

    def progress(self, step: int, total: int, values: Mapping[str, Any]) -> None:
        """One line a report; validation always stays on the screen."""
        text = sentence(values, total, self._eta(step, total))
        if self.console.terminal and "valid" not in values and step < total:
            self.console.write(f"\r\033[K{fitted(bar(step, total), text, self.console.columns)}")
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
