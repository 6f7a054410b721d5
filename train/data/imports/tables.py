"""Reads Parquet files, and folders that Hugging Face ``datasets`` saved (Arrow), row by row, through pyarrow.

A column of audio is a struct of ``bytes`` and ``path`` (an encoded file), or of ``array`` and ``sampling_rate``
(samples), or plain bytes. All columns of numbers and texts become keys of the line.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nest_fn.extras import load_extra
from nest_fn.train.errors import DataError, UsageError

from ..audio_files.wav import wav_bytes
from .record import LeftOut, Record

_NAMES = ("audio", "speech", "wav", "flac", "mp3", "bytes")  # of a column of plain bytes
_TEXTS = ("sentence", "transcription", "transcript", "normalized_text", "raw_text")  # columns that are the text
_ROWS = 64  # rows in memory at a time


def table_files(source: Path) -> list[Path]:
    """The Parquet or Arrow files of a source, a file or a folder, in order; caches of ``datasets`` are left out."""
    if source.is_file():
        return [source] if source.suffix in (".parquet", ".arrow") else []
    found = [path for path in sorted(source.rglob("*")) if path.suffix in (".parquet", ".arrow")]
    return [path for path in found if not path.name.startswith(("cache-", "."))]


def table_records(files: list[Path], column: str | None) -> Iterator[Record | LeftOut]:
    """The rows of all files; ``column`` is the audio's name, by default the only one that can be.

    Raises ``DataError`` for a file that cannot be read, ``UsageError`` without pyarrow, or where the column is unclear.
    """
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            name = _audio_column(row, column, file)
            where, audio = f"{file}, row {number}", row[name]
            fields = {key: value for key, value in row.items() if key != name and _is_plain(value)}
            if "text" not in fields:
                texts = [fields[key] for key in _TEXTS if isinstance(fields.get(key), str)]
                fields |= {"text": texts[0]} if texts else {}
            yield _record(audio, fields, where, file.parent)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        parquet, ipc = load_extra("pyarrow.parquet"), load_extra("pyarrow.ipc")
    except ImportError as error:
        raise UsageError(f"data import: {error}") from error
    try:
        if file.suffix == ".parquet":
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()
        else:
            with open(file, "rb") as stream:
                for batch in _arrow_batches(ipc, stream):
                    for first in range(0, batch.num_rows, _ROWS):
                        yield from batch.slice(first, _ROWS).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise DataError(f"{file}: cannot be read: {error}") from error


def _arrow_batches(ipc: Any, stream: io.BufferedReader) -> Iterator[Any]:
    """Record batches of an Arrow file or, as ``datasets`` writes them, of an Arrow stream."""
    try:
        opened = ipc.open_file(stream)
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
    except ValueError:
        stream.seek(0)
        yield from ipc.open_stream(stream)


def _audio_column(row: Mapping[str, Any], column: str | None, file: Path) -> str:
    if column is not None:
        if column not in row:
            raise UsageError(f"data import: {file} has no column {column!r}; there are {', '.join(row)}")
        return column
    found = [name for name, value in row.items() if isinstance(value, dict) and {"bytes", "array"} & value.keys()]
    found = found or [name for name in row if name in _NAMES and isinstance(row[name], bytes | type(None))]
    if len(found) != 1:
        what = (
            f"{len(found)} columns of audio ({', '.join(found)})" if found else f"no column of audio: {', '.join(row)}"
        )
        raise UsageError(f"data import: {file} has {what}; name one with --audio-column")
    return found[0]


def _record(audio: Any, fields: Mapping[str, Any], where: str, base: Path) -> Record | LeftOut:
    held = audio if isinstance(audio, dict) else {"bytes": audio}
    name, content = held.get("path"), held.get("bytes")
    if content is None and held.get("array") is not None:
        samples = np.clip(np.rint(np.asarray(held["array"], np.float64) * 32768), -32768, 32767).astype(np.int16)
        return Record(where, name or "array.wav", wav_bytes(samples, int(held["sampling_rate"])), fields)
    if content is not None:
        return Record(where, name, bytes(content), fields)
    if not isinstance(name, str) or not name:
        return LeftOut(where, "it has neither audio nor a path")
    return Record(where, name if "://" in name else os.path.join(os.path.abspath(base), name), None, fields)


def _is_plain(value: object) -> bool:
    """Whether a value can be a key's of a line."""
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return isinstance(value, str | int | bool) or (isinstance(value, list) and all(_is_plain(one) for one in value))
