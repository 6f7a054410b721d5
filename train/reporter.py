"""The interface through which a run reports to a user: the command line prints, ranks other than 0 are silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Reporter(Protocol):
    """Receives the messages of a run."""

    def say(self, text: str) -> None:
        """Report information, in one line."""

    def warn(self, text: str) -> None:
        """Report a warning, in one line."""

    def progress(self, step: int, total: int, values: Mapping[str, Any]) -> None:
        """Report the metrics ``values`` after ``step`` of ``total`` steps."""


class NullReporter:
    """The silent reporter of ranks other than 0."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Do nothing."""

    def progress(self, step: int, total: int, values: Mapping[str, Any]) -> None:
        """Do nothing."""
