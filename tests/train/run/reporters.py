"""Who is told of a run, and acts on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class At:
    """A reporter that does something when a step has been measured."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act
        self.told: list[str] = []

    def say(self, text: str) -> None:
        """Keep it."""
        self.told.append(text)

    def warn(self, text: str) -> None:
        """Keep it."""
        self.told.append(text)

    def progress(self, step: int, total: int, values: Mapping[str, Any]) -> None:
        """Do it."""
        if step == self.step and "valid" not in values:
            self.act()
