"""``nest-fn data import``: writes a corpus in another form as a folder with a manifest, and the audio that it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nest_fn.files.outputs import claim, written
from nest_fn.train.errors import DataError, UsageError
from nest_fn.version import versions

from ..audio_files.audio import audio_info
from ..corpus_tools import Report
from .lhotse import is_lhotse, lhotse_records
from .record import LeftOut, Record
from .tables import table_files, table_records

MANIFEST = "manifest.jsonl"
_IN_FOLDER = 1000  # audio files in one folder
_MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff": ".mp3", b"FORM": ".aiff"}


def import_corpus(
    source: str | Path, out: str | Path, *, column: str | None = None, overwrite: bool = False
) -> Report:  # fmt: skip
    """Write ``manifest.jsonl`` into the folder ``out``, and ``audio/`` if the source holds the audio itself.

    A source is a lhotse manifest of cuts or recordings, a Parquet file, or a folder of Parquet or Arrow files as
    ``datasets`` saves them. What cannot be imported is reported and left out. Raises ``DataError`` if nothing can be.
    """
    source = Path(source)
    files, records = _open(source, column)
    listing = [[os.path.abspath(file), file.stat().st_size] for file in files]
    origin = {"command": "data import", "source": os.path.abspath(source), "files": listing, "column": column}
    place = claim(out, origin | versions(), folder=True, inputs=files, overwrite=overwrite)
    if place.done:
        return Report(_lines(place.path / MANIFEST), ())
    problems: list[str] = []
    with written(place) as temporary:
        temporary.mkdir()
        count = _write(records, temporary, problems)
        if not count:
            raise DataError(
                f"import: nothing of {source} can be imported: {problems[0] if problems else 'it is empty'}"
            )
    return Report(count + len(problems), tuple(problems))


def _open(source: Path, column: str | None) -> tuple[list[Path], Iterator[Record | LeftOut]]:
    if not source.exists():
        raise DataError(f"import: {source}: no such file or folder")
    tables = table_files(source)
    if tables:
        return tables, table_records(tables, column)
    if source.is_file() and is_lhotse(source):
        if column is not None:
            raise UsageError("data import: --audio-column is for tables; a lhotse manifest has none")
        return [source], lhotse_records(source)
    raise DataError(
        f"import: {source} is neither a lhotse manifest of cuts or recordings (.jsonl, .jsonl.gz) nor has .parquet "
        "or .arrow files; for a folder of audio use nest-fn data scan"
    )


def _write(records: Iterable[Record | LeftOut], folder: Path, problems: list[str]) -> int:
    """Write audio and manifest; the number of lines."""
    count = 0
    with open(folder / MANIFEST, "w", encoding="utf-8") as manifest:
        for record in records:
            if isinstance(record, LeftOut):
                problems.append(str(record))
                continue
            try:
                line = _line(record, folder, count)
            except DataError as error:
                problems.append(f"{record.where}: {error}")
                continue
            manifest.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count


def _line(record: Record, folder: Path, number: int) -> dict[str, Any]:
    """The manifest's line of a record, with its audio written. Raises ``DataError`` for audio that cannot be read."""
    fields = {key: value for key, value in record.fields.items() if key not in ("audio_filepath", "audio_filename")}
    if record.content is None:
        return {"audio_filepath": record.path, **fields}
    stem = "".join(one if one.isalnum() or one in "-_" else "_" for one in Path(record.path or "").stem)[-60:]
    name = f"audio/{number // _IN_FOLDER:04d}/{number:08d}{'_' if stem else ''}{stem}{_suffix(record)}"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(record.content)
    try:
        duration = audio_info(path).duration
    except DataError as error:
        path.unlink()
        raise DataError(str(error).removeprefix(f"{path}: ")) from None
    return {"audio_filepath": name, **fields, "duration": duration}


def _suffix(record: Record) -> str:
    """The ending of a name, from what the content begins with, else as it was."""
    assert record.content is not None
    found = (suffix for magic, suffix in _MAGIC.items() if record.content.startswith(magic))
    return next(found, Path(record.path or "").suffix or ".audio")


def _lines(path: Path) -> int:
    with open(path, "rb") as stream:
        return sum(1 for _ in stream)
