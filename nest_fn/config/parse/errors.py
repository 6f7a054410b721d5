"""One error type for everything that can be wrong with a configuration, and a basket that collects problems."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

_QUOTED = re.compile(r"^'([\w.]+)'")


class ConfigError(ValueError):
    """A configuration that cannot be used: ``problems`` holds one line each, ``source`` the file they stand in."""

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(problems)
        self.source = source
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            super().__init__("\n  ".join((f"{source}: {len(self.problems)} problems", *self.problems)))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...], str]]:
        return type(self), (self.problems, self.source)


class Problems:
    """Collects what is wrong, so that a reader sees all of it at once.

    ``written`` maps our key paths to the ones that stand in the user's file, where the two differ.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.written: dict[str, str] = {}

    def name(self, path: str) -> str:
        """The path as the user wrote it: the longest known prefix is translated back."""
        parts = path.split(".")
        for end in range(len(parts), -1, -1):
            prefix = ".".join(parts[:end])
            if prefix in self.written:
                return ".".join(part for part in (self.written[prefix], *parts[end:]) if part)
        return path

    def as_written(self, line: str) -> str:
        """A line about one of our paths, as the cross-field checks make it, with the user's name of the path."""
        return _QUOTED.sub(lambda match: f"'{self.name(match[1])}'", line)

    def add(self, path: str, message: str) -> None:
        """Note that the value at ``path`` is wrong: ``'model.encoder.n_heads' must divide ...``."""
        self.lines.append(f"'{self.name(path)}' {message}")

    def require(self, holds: bool, path: str, message: str) -> None:
        """Note ``message`` unless ``holds``."""
        if not holds:
            self.add(path, message)

    def unknown(self, path: str, known: Iterable[str]) -> None:
        """Note a key that nobody reads, with the nearest known one."""
        near = difflib.get_close_matches(path.rpartition(".")[2], sorted(known), n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(sorted(known))}"
        self.lines.append(f"unknown key '{self.name(path)}'{hint}")

    def raise_if_any(self, source: str = "config") -> None:
        """Raise ``ConfigError`` with everything collected so far."""
        if self.lines:
            raise ConfigError(self.lines, source)
