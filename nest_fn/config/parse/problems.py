"""The error of invalid configurations, and a collector of problems."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from nest_fn.files.quoting import clip, printable

_SHOWN = 20  # maximum problems in a message
_LONGEST = 900  # maximum characters of one problem
_QUOTED = re.compile(r"^'([\w.]+)'")


class ConfigError(ValueError):
    """An invalid configuration: ``problems`` has one line for each problem, ``source`` is the file that was read."""

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(clip(printable(line).replace("\n", " "), _LONGEST) for line in problems)
        self.source = source
        if len(self.problems) == 1:
            super().__init__(f"{source}: {self.problems[0]}")
        else:
            more = len(self.problems) - _SHOWN
            lines = [f"{source}: {len(self.problems)} problems", *self.problems[:_SHOWN]]
            super().__init__("\n  ".join([*lines, f"and {more} more"] if more > 0 else lines))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...], str]]:
        return type(self), (self.problems, self.source)


def blame_overrides(
    error: ConfigError, overrides: Sequence[str], problems_of: Callable[[Sequence[str]], Sequence[str]]
) -> ConfigError:
    """Name the overrides as the source of those problems that the file does not have without them.

    ``problems_of`` are the problems that the file has with some of the overrides.
    """
    of_file = problems_of(())
    brought = [line for line in error.problems if line not in of_file]
    if not brought:
        return error
    if any(line.startswith("override ") for line in brought):
        source = "overrides"
    else:
        source = "override " + clip(" ".join(_overrides_of(brought, overrides, problems_of)), 200)
    rest = [f"{error.source}: {line}" for line in error.problems if line in of_file]
    return ConfigError([*brought, *rest], source)


def _overrides_of(
    lines: Sequence[str], overrides: Sequence[str], problems_of: Callable[[Sequence[str]], Sequence[str]]
) -> list[str]:
    """The overrides that set the keys at the beginning of ``lines`` or, for other keys, without which a line is gone.

    All overrides if there are none, for two may have the same effect.
    """
    named = {text: text.partition("=")[0].strip().removeprefix("model.") for text in overrides}
    keys = {line: _key(line) for line in lines}
    found: set[str] = set()
    for line, key in keys.items():
        own = {text for text, path in named.items() if key == path or key.startswith(f"{path}.")}
        found |= own or {text for text in named if _is_cause(text, line, overrides, problems_of)}
    return [text for text in named if text in found] or list(overrides)


def _is_cause(
    text: str, line: str, overrides: Sequence[str], problems_of: Callable[[Sequence[str]], Sequence[str]]
) -> bool:
    """Whether a problem is gone without an override, and not because another problem is met before it."""
    left = problems_of([one for one in overrides if one != text])
    return line not in left and all(_key(other) == _key(line) for other in left)


def _key(line: str) -> str:
    """The key at the beginning of a problem."""
    match = _QUOTED.search(line.removeprefix("unknown key "))
    return match[1].removeprefix("model.") if match else ""


class Problems:
    """Collects problems, so that all of them are reported at once.

    ``written`` maps our key paths to those of the user's file, where they differ.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.written: dict[str, str] = {}
        self.unused: list[str] = []  # remarks on keys without effect

    def name(self, path: str) -> str:
        """The path as in the user's file: its longest prefix in ``written`` is replaced."""
        parts = path.split(".")
        for end in range(len(parts), -1, -1):
            prefix = ".".join(parts[:end])
            if prefix in self.written:
                return ".".join(part for part in (self.written[prefix], *parts[end:]) if part)
        return path

    def as_written(self, line: str) -> str:
        """Replace our path at the beginning of a problem by the path in the user's file."""
        return _QUOTED.sub(lambda match: f"'{self.name(match[1])}'", line)

    def add(self, path: str, message: str) -> None:
        """Record that the value at ``path`` is wrong: ``'model.encoder.n_heads' must divide ...``."""
        self.lines.append(f"'{clip(self.name(path), 200)}' {message}")

    def require(self, holds: bool, path: str, message: str) -> None:
        """Record ``message`` unless the condition ``holds``."""
        if not holds:
            self.add(path, message)

    def without_effect(self, section: str, keys: Sequence[str], instead: Mapping[str, str]) -> None:
        """Record known keys without effect here, each with the setting to use ``instead``, if there is one."""
        named = [self.name(f"{section}.{key}" if section else key) for key in keys]
        told = [f"{name} ({instead[key]})" if key in instead else name for name, key in zip(named, keys, strict=True)]
        if told:
            self.unused.append(f"without effect here: {clip(', '.join(told), 600)}")

    def unknown(self, path: str, known: Iterable[str]) -> None:
        """Record an unknown key, with the most similar known one."""
        near = difflib.get_close_matches(path.rpartition(".")[2][:100], sorted(known), n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(sorted(known))}"
        self.lines.append(f"unknown key '{clip(self.name(path), 200)}'{clip(hint, 600)}")

    def raise_if_any(self, source: str = "config") -> None:
        """Raise ``ConfigError`` with all problems recorded so far, if any."""
        if self.lines:
            raise ConfigError(self.lines, source)
