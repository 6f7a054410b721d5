"""Reads lhotse manifests of cuts or recordings (JSON lines, perhaps compressed by gzip), without lhotse.

A cut is a part of a recording: ``start`` and ``duration`` become ``offset`` and ``duration``, its channels ``channel``,
the texts of its supervisions, in order of time, ``text``, unless one reaches beyond the cut. What lhotse would compute
when it loads a cut (mixing, padding, changes of speed or volume, resampling) is not audio that exists as a file; such
cuts are named and left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nest_fn.train.errors import DataError

from ..corpus.manifest_lines import open_manifest, parse_line, text_of
from .record import LeftOut, Record

_EDGE = 0.05  # seconds by which a supervision may reach beyond its cut
_KEPT = ("speaker", "language", "gender")  # keys of a supervision that a line takes over


def is_lhotse(path: Path) -> bool:
    """Whether the first line of a file is a cut or a recording."""
    try:
        with open_manifest(str(path), text_of(str(path))) as stream:
            first = parse_line(stream.readline(1 << 22))
    except (DataError, OSError):
        return False
    return "sources" in first or ("start" in first and "id" in first and "duration" in first)


def lhotse_records(path: Path) -> Iterator[Record | LeftOut]:
    """The cuts or recordings of a manifest, in order. Raises ``DataError`` for a line that is no JSON object."""
    base = Path(os.path.abspath(path)).parent
    with open_manifest(str(path), text_of(str(path))) as stream:
        for number, line in enumerate(stream, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                entry = parse_line(line)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            try:
                yield _record(entry, where, base)
            except (KeyError, TypeError, ValueError) as error:
                yield LeftOut(where, f"not a cut or recording as lhotse writes them ({type(error).__name__}: {error})")


def _record(entry: Mapping[str, Any], where: str, base: Path) -> Record | LeftOut:
    recording = entry if "sources" in entry else entry.get("recording")
    obstacle = _obstacle(entry, recording)
    if obstacle is not None or recording is None:
        return LeftOut(where, obstacle or "it has no recording")
    source = recording["sources"][0]
    supervisions = sorted(entry.get("supervisions") or [], key=lambda one: float(one.get("start", 0)))
    fields: dict[str, Any] = {"id": entry["id"]}
    if entry is not recording:
        fields["offset"] = float(entry["start"])
    fields["duration"] = float(entry["duration"])
    channel = entry.get("channel")
    if channel is not None and len(source.get("channels") or [0]) > 1:
        fields["channel"] = channel
    texts = [str(one["text"]) for one in supervisions if one.get("text")] if _inside(supervisions, entry) else []
    fields |= {"text": " ".join(texts)} if texts else {}
    for key in _KEPT:
        values = {one[key] for one in supervisions if one.get(key)}
        fields |= {key: values.pop()} if len(values) == 1 else {}
    return Record(where, _located(str(source["source"]), source["type"], base), None, fields)


def _inside(supervisions: Sequence[Mapping[str, Any]], cut: Mapping[str, Any]) -> bool:
    """Whether what was said lies in the cut as a whole; if not, its text is not that of the cut."""
    ends = (float(one.get("start", 0)) + float(one.get("duration", 0)) for one in supervisions)
    begins = (float(one.get("start", 0)) for one in supervisions)
    return min(begins, default=0.0) > -_EDGE and max(ends, default=0.0) < float(cut["duration"]) + _EDGE


def _obstacle(entry: Mapping[str, Any], recording: Mapping[str, Any] | None) -> str | None:
    """Why a cut is not a part of a file."""
    kind = entry.get("type", "MonoCut")
    if "sources" not in entry and kind not in ("MonoCut", "MultiCut"):
        return f"a {kind} is made when it is loaded; save it as audio first"
    if recording is None:
        return "it has no recording (perhaps only features)"
    if recording.get("transforms"):
        return "its recording is changed when it is loaded (transforms); save it as audio first"
    sources = recording["sources"]
    if len(sources) != 1 or sources[0]["type"] not in ("file", "url"):
        kinds = ", ".join(sorted({str(one["type"]) for one in sources}))
        return f"its recording has {len(sources)} sources of type {kinds}; one file is read"
    return None


def _located(source: str, kind: str, base: Path) -> str:
    """The absolute path of a source: relative ones start from lhotse's working folder, else from the manifest's."""
    if kind == "url":
        return source
    here = os.path.abspath(source)
    return here if os.path.exists(here) else str(base / source)
