"""The lines of a manifest: JSON objects, one per utterance, read strictly; all bad lines are reported.

``audio_filepath`` (or ``audio_filename``) is required; ``duration`` and ``offset`` are seconds; ``shard_id`` is for tar
shards; all other keys are kept as they are (reference 7.1).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nest_fn.files.inputs import open_plain
from nest_fn.files.quoting import shown
from nest_fn.train.errors import DataError

_SHOWN = 20  # most problems that an error message lists
_BOM = b"\xef\xbb\xbf"
_LONGEST = 1 << 22  # most bytes of a line


class Entry(NamedTuple):
    """One utterance's line."""

    name: str  # the audio's path as written
    offset: float  # seconds
    duration: float  # seconds; NaN: to be read from the file
    shard: int  # -1: not given
    line: int  # from 1
    position: int  # of the line, in bytes from the start of the file


@dataclass
class LineProblems:
    """Collects the problems of a manifest, so that one error reports them together."""

    lines: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, where: str, text: object) -> None:
        """Add a problem; the first 20 are kept, the rest are only counted."""
        self.total += 1
        if len(self.lines) < _SHOWN:
            self.lines.append(f"{where}: {text}" if where else str(text))

    def raise_any(self, what: str) -> None:
        """Raise one ``DataError`` with the collected problems, if there are any."""
        if self.total == 1:
            raise DataError(self.lines[0])
        if self.total:
            more = f"\n  and {self.total - len(self.lines)} more" if self.total > len(self.lines) else ""
            raise DataError(f"{what}: {self.total} problems\n  " + "\n  ".join(self.lines) + more)


def read_entries(file: str, problems: LineProblems) -> Iterator[Entry]:
    """Yield the utterances of a manifest in order; bad lines are added to ``problems``.

    Raises ``DataError`` if the manifest cannot be read, or a line is too long.
    """
    try:
        with open_plain(file) as stream:
            position = 0
            for number, raw in enumerate(iter(lambda: stream.readline(_LONGEST + 1), b""), start=1):
                if len(raw) > _LONGEST:
                    raise DataError(f"{file}:{number}: the line is longer than {_LONGEST} bytes: {_short(raw)}")
                text = raw.removeprefix(_BOM) if number == 1 else raw
                text = text.strip(b" \t\r\n")
                if text:
                    try:
                        yield _entry(parse_line(text), number, position)
                    except DataError as error:
                        problems.add(f"{file}:{number}", error)
                position += len(raw)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"manifest {file}: {reason}; looked for {Path(file).absolute()}") from error


def parse_line(text: bytes) -> dict[str, Any]:
    """Parse one line's JSON object. Raises ``DataError`` that says what is wrong with the line."""
    try:
        record = json.loads(text)
    except UnicodeDecodeError:
        raise DataError("the line is not UTF-8; save the manifest as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON object: {error} in {_short(text)}") from None
    if not isinstance(record, dict):
        raise DataError(f"not a JSON object but {type(record).__name__}: {_short(text)}")
    return record


def _entry(record: dict[str, Any], line: int, position: int) -> Entry:
    """The keys that ``Entry`` has, with their types checked."""
    name = record.get("audio_filepath", record.get("audio_filename"))
    if name is None:
        raise DataError(
            f"the key audio_filepath is missing; there are {', '.join(map(shown, list(record)[:8])) or 'none'}"
        )
    _check_name(name)
    offset = _seconds(record.get("offset"), "offset", 0.0)
    duration = _seconds(record.get("duration"), "duration", math.nan)
    if offset < 0:
        raise DataError(f"offset {offset} is negative; it is seconds from the start of the file")
    if duration <= 0:
        raise DataError(f"duration {duration} is not positive; leave it out to have it read from the file")
    return Entry(name, offset, duration, _shard(record.get("shard_id")), line, position)


def _check_name(name: object) -> None:
    """Raise ``DataError`` for a value that cannot be a path."""
    if not isinstance(name, str):
        raise DataError(f"audio_filepath is {type(name).__name__} {_short(name)}, a path is wanted")
    if not name.strip() or "\0" in name:
        raise DataError(f"audio_filepath {_short(name)} is empty or holds a null byte")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise DataError(f"audio_filepath {_short(name)} holds a lone surrogate, which no file name can have") from None


def _seconds(value: object, key: str, missing: float) -> float:
    """A finite number of seconds, from a number or a string; ``missing`` for None. Raises ``DataError``."""
    if value is None:
        return missing
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise DataError(f"{key} is {type(value).__name__} {_short(value)}, a number of seconds is wanted")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"{key} {_short(value)} is not a number of seconds") from None
    if not math.isfinite(number):
        raise DataError(f"{key} is {number}, a finite number of seconds is wanted")
    return number


def _shard(value: object) -> int:
    """A shard's number, -1 if the line has none. Raises ``DataError``."""
    if value is None:
        return -1
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise DataError(f"shard_id is {_short(value)}, a number from 0 is wanted")
    return value


def _short(value: object) -> str:
    """A value as short text on one line."""
    return shown(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
