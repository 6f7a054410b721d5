"""The lines of a manifest: JSON objects, one per utterance, read strictly; all bad lines are reported.

``audio_filepath`` (or ``audio_filename``) is required; ``duration`` and ``offset`` are seconds; ``shard_id`` is for tar
shards; ``channel`` is an index or a list of them; all other keys are kept as they are (reference 7.1).

A million lines cost seconds: what a line of the usual form says is read quickly (``_usual``). Any other, be it good or
bad, is read again by ``parse_line`` and ``_entry``, which know what is wrong with it.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nest_fn.files.inputs import open_plain, other_format
from nest_fn.files.quoting import shown
from nest_fn.train.errors import DataError

from ..audio_files.remote import is_remote, remote_bytes

_SHOWN = 20  # most problems that an error message lists
BOM = b"\xef\xbb\xbf"  # may stand before the first line
LONGEST = 1 << 22  # most bytes of a line
BLOCK = 1 << 20  # bytes that are read at a time
_GZIP = b"\x1f\x8b"  # how such a file begins
_HUGE = 1e9  # seconds; larger numbers may be too large for a float
_decode = json.JSONDecoder().raw_decode


class Entry(NamedTuple):
    """One utterance's line."""

    name: str  # the audio's path as written
    offset: float  # seconds
    duration: float  # seconds; NaN: to be read from the file
    shard: int  # -1: not given
    channel: tuple[int, ...] = ()  # indices; none: not given


@dataclass
class EntryBlock:
    """The utterances of consecutive lines, as columns of equal length."""

    names: list[str] = field(default_factory=list)
    offset: list[float] = field(default_factory=list)  # seconds
    duration: list[float] = field(default_factory=list)  # seconds; NaN: to be read from the file
    shard: list[int] = field(default_factory=list)  # -1: not given
    channel: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of the utterances that name channels, by number
    line: list[int] = field(default_factory=list)  # from 1
    position: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # of the line in the file, bytes

    def add(self, entry: Entry, line: int) -> None:
        """Add an utterance at the end of the columns, all but ``position``."""
        if entry[4]:
            self.channel[len(self.names)] = entry[4]
        self.names.append(entry[0])
        self.offset.append(entry[1])
        self.duration.append(entry[2])
        self.shard.append(entry[3])
        self.line.append(line)


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


def text_of(file: str) -> bytes | None:
    """The text of a manifest that is at an address, or that gzip compressed; None for a plain file, read in blocks.

    Raises ``DataError`` if it cannot be read, or is damaged.
    """
    if is_remote(file):
        content = remote_bytes(file)
        return _inflated(content, file) if _is_compressed(content, file) else content
    with _told(file), open_plain(file) as stream:
        if not _is_compressed(stream.read(8), file):
            return None
        stream.seek(0)
        return _inflated(stream.read(), file)


def _is_compressed(content: bytes, file: str) -> bool:
    """Whether gzip compressed what begins with ``content``. Raises ``DataError`` for what is not read otherwise."""
    if content.startswith(_GZIP) or (found := other_format(content)) is None:
        return content.startswith(_GZIP)
    remedy = "nest-fn data import reads it" if "Parquet" in found else "unpack it, or compress it by gzip"
    raise DataError(f"manifest {file} is {found}: {remedy}")


def _inflated(content: bytes, file: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"manifest {file}: its gzip data are damaged or cut ({error}); make it anew") from error


def open_manifest(file: str, text: bytes | None) -> BinaryIO:
    """A manifest's bytes: ``text``, where ``text_of`` has given it, else the file's."""
    return open_plain(file) if text is None else io.BytesIO(text)


@contextmanager
def _told(file: str) -> Iterator[None]:
    """Raise a failed read as ``DataError`` that names the manifest."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"manifest {file}: {reason}; looked for {Path(file).absolute()}") from error


def read_blocks(
    file: str, problems: LineProblems, size: int = BLOCK, text: bytes | None = None
) -> Iterator[EntryBlock]:  # fmt: skip
    """Yield the utterances of a manifest in order, ``size`` bytes at a time; bad lines are added to ``problems``.

    ``text`` is as for ``open_manifest``. Raises ``DataError`` if the manifest cannot be read, or a line is too long.
    """
    with _told(file), open_manifest(file, text) as stream:
        first, position = 1, 0
        while data := stream.read(size) + stream.readline(LONGEST + 1):
            last = data[data.rfind(b"\n", 0, -1) + 1 :]
            if len(last) > LONGEST:  # no other line can be, for it began in this block
                number = first + data.count(b"\n", 0, -1)
                raise DataError(f"{file}:{number}: the line is longer than {LONGEST} bytes: {_short(last)}")
            block = _parse(data, file, first, problems)
            block.position = _begins(data)[np.array(block.line, np.int64) - first] + position
            yield block
            first, position = first + data.count(b"\n"), position + len(data)


def _begins(data: bytes) -> NDArray[np.int64]:
    """The places at which the lines of ``data`` begin."""
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1])


def _parse(data: bytes, file: str, first: int, problems: LineProblems) -> EntryBlock:
    """The utterances of whole lines, of which the first has number ``first``."""
    block = EntryBlock()
    for number, line in enumerate(_split(data), first):
        entry = _usual(line) if isinstance(line, str) else None
        if entry is None:
            try:
                entry = parse_entry(line.encode() if isinstance(line, str) else line, number)
            except DataError as error:
                problems.add(f"{file}:{number}", error)
        if entry is not None:
            block.add(entry, number)
    return block


def _split(data: bytes) -> Sequence[str | bytes]:
    """The lines, as bytes if not all of them are UTF-8."""
    try:
        return data.decode().split("\n")
    except UnicodeDecodeError:
        return data.split(b"\n")


def _usual(line: str) -> Entry | None:
    """What a line of the usual form says; None for any other, be it good or bad."""
    try:
        record, end = _decode(line)
    except (ValueError, RecursionError):
        return None
    if (end != len(line) and line[end:] != "\r") or type(record) is not dict:
        return None
    name: Any = record.get("audio_filepath")
    duration: Any = record.get("duration")
    offset: Any = record.get("offset", 0.0)
    shard: Any = record.get("shard_id", 0)
    if not (type(name) is str and name.isascii() and name.strip()) or "\0" in name:
        return None
    if type(shard) is not int or not 0 <= shard < 1 << 31 or "channel" in record:
        return None
    shard = shard if "shard_id" in record else -1
    numbers = (type(duration) is float or type(duration) is int) and (type(offset) is float or type(offset) is int)
    return Entry(name, offset, duration, shard) if numbers and 0 < duration < _HUGE and 0 <= offset < _HUGE else None


def parse_entry(line: bytes, number: int) -> Entry | None:
    """The utterance of line ``number``; None if it is empty. Raises ``DataError`` that says what is wrong with it."""
    text = (line.removeprefix(BOM) if number == 1 else line).strip(b" \t\r\n")
    return _entry(parse_line(text)) if text else None


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


def _entry(record: dict[str, Any]) -> Entry:
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
    return Entry(name, offset, duration, _shard(record.get("shard_id")), _channels(record.get("channel")))


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


def _channels(value: object) -> tuple[int, ...]:
    """The channels of a line: an index, or a list of indices whose mean is read. A text is a label of the user's own.

    Raises ``DataError``.
    """
    if value is None or (isinstance(value, str) and not value.strip().lstrip("-").isdigit()):
        return ()
    given = value if isinstance(value, list) else [value]
    if not given or not all(type(one) is int and 0 <= one < 1024 for one in given):
        raise DataError(f"channel is {_short(value)}, an index from 0 or a list of such is wanted")
    return tuple(given)


def _short(value: object) -> str:
    """A value of a line as short text on one line."""
    return shown(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
