"""Who reports a run to a person: the command line has a reporter that prints, ranks other than 0 one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Reporter(Protocol):
    """Where a run reports."""

    def say(self, text: str) -> None:
        """A line of information."""

    def warn(self, text: str) -> None:
        """A line that asks for attention."""

    def progress(self, step: int, total: int, values: Mapping[str, Any]) -> None:
        """A step was made and measured."""


class NullReporter:
    """The reporter of a rank that leaves talking to rank 0."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def progress(self, step: int, total: int, values: Mapping[str, Any]) -> None:
        """Nothing."""
