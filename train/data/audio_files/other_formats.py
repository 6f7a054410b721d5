"""Audio files of every format but plain WAV, through the optional package soundfile: FLAC, Ogg, MP3, AIFF, CAF, ..."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nest_fn.extras import load_extra
from nest_fn.files.inputs import open_plain
from nest_fn.train.errors import DataError, UsageError

from .foreign import HEAD, kind_of
from .wav import Source, Span

SUFFIXES = (
    ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".sph",
    ".nist", ".voc", ".iff", ".svx", ".sd2",
)  # fmt: skip
"""Endings of names of files that soundfile reads."""

MP3 = ("MP3", "MPEG")  # names of the format in versions of libsndfile
_BLOCK = 1 << 24  # frames decoded at a time
_UNKNOWN = 1 << 60  # frames: a larger number means that the header gives none


@contextmanager
def open_other(source: Source) -> Iterator[Any]:
    """An open ``soundfile.SoundFile``; a tar member is read into memory first. Raises ``DataError``, ``UsageError``."""
    soundfile = _import_soundfile()
    content = _span_bytes(source) if isinstance(source, Span) else None

    def opened(kind: Any) -> Any:
        file = kind(os.fsencode(str(source)) if content is None else io.BytesIO(content))
        if file.samplerate < 1 or file.channels < 1:
            raise DataError(f"the header says {file.channels} channels at {file.samplerate} Hz")
        return file

    try:
        with opened(soundfile.SoundFile) as file:
            known = file.frames < _UNKNOWN
            if known:
                yield file
        if not known:
            with opened(_without_seeking(soundfile)) as file:
                yield file
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a headerless format, which needs parameters
        kind = kind_of(_head(source) if content is None else content[:HEAD])
        raise DataError(f"cannot be decoded: {f'it is {kind}' if kind else error}") from error


def frames_of(file: Any) -> int:
    """Frames of an open file: as its header says or, where that does not know, as many as can be decoded.

    Without a table of contents, the length of an MP3 is a guess from its first frames; it counts if the end is there.
    """
    if file.frames < _UNKNOWN:
        if file.format not in MP3 or _end_is_there(file):
            return int(file.frames)
        file.seek(0)
    count = 0
    while got := len(file.read(_BLOCK >> 4, dtype="int16", always_2d=True)):
        count += got
    return count


def _end_is_there(file: Any) -> bool:
    last = min(int(file.frames), file.samplerate // 50)
    file.seek(file.frames - last)
    return len(file.read(last, dtype="int16", always_2d=True)) == last


def decode(file: Any, start: int, count: int | None) -> tuple[NDArray[Any], int]:
    """Frames ``[start, start + count)``, ``[n, channels]``, and their number as wanted; ``count=None``: to the end.

    Integers are returned as int16, lossy and float formats as float32. They are read in blocks, since the number of
    frames may come from a wrong header. Raises ``DataError`` if ``start`` is beyond the end.
    """
    known = file.frames < _UNKNOWN
    if known and start >= file.frames:
        raise DataError(
            f"offset {start / file.samplerate} s is beyond its end at {file.frames / file.samplerate:.3f} s"
        )
    if start:
        _skip(file, start)
    expected = count if count is not None else file.frames - start
    kind = "int16" if file.subtype.startswith("PCM") else "float32"
    blocks: list[NDArray[Any]] = []
    remaining = expected
    while remaining > 0 and (not blocks or len(blocks[-1]) == _BLOCK):
        blocks.append(file.read(min(remaining, _BLOCK), dtype=kind, always_2d=True))
        remaining -= len(blocks[-1])
    frames = blocks[0] if len(blocks) == 1 else np.concatenate([np.empty((0, file.channels), kind), *blocks])
    return frames, expected if known or count is not None else len(frames)


def _skip(file: Any, start: int) -> None:
    """Go to a frame; by decoding all before it in a file that cannot be sought in: GSM, or one of unknown length."""
    if file.seekable():
        file.seek(start)
        return
    while start > 0 and (got := len(file.read(min(start, _BLOCK), dtype="int16", always_2d=True))):
        start -= got


def _without_seeking(soundfile: Any) -> Any:
    """A ``SoundFile`` that does not seek after each read, which fails in a file of unknown length."""
    return type("SoundFileInOrder", (soundfile.SoundFile,), {"seekable": lambda self: False})


def _import_soundfile() -> Any:
    try:
        return load_extra("soundfile")
    except ImportError as error:
        raise UsageError(f"only WAV of PCM or float samples is read without soundfile: {error}") from error


def _head(path: Any) -> bytes:
    with open_plain(path) as file:
        return file.read(HEAD)


def _span_bytes(span: Span) -> bytes:
    """The bytes of a tar member, fewer if the archive is truncated."""
    with open_plain(span.path) as file:
        file.seek(span.start)
        return file.read(min(span.size, os.fstat(file.fileno()).st_size))
