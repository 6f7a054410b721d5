"""Reads PCM and float WAV files, without trusting their headers, and writes 16-bit ones.

Every chunk is checked against the size of the file, and no allocation depends on an unchecked number in the header. A
WAV file may also be a byte range of another file (a member of a tar archive): see ``Span``.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nest_fn.files.inputs import open_plain
from nest_fn.train.errors import DataError


class Span(NamedTuple):
    """Bytes ``[start, start + size)`` of a file: the member ``name`` of a tar archive, read in place."""

    path: str
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}[{self.name}]"


Source: TypeAlias = str | Path | Span
"""The location of one audio file's bytes."""


class UnreadWav(DataError):
    """A WAV file whose samples are of a type that is not read here: mu-law, A-law, ADPCM, ..."""


PCM, IEEE_FLOAT, EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
_GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")  # of every SubFormat that begins with a plain format tag
_SAMPLE_TYPES = {(PCM, 8): "u1", (PCM, 16): "<i2", (PCM, 24): "u1", (PCM, 32): "<i4"}
_SAMPLE_TYPES |= {(IEEE_FLOAT, 32): "<f4", (IEEE_FLOAT, 64): "<f8"}
_MAX_CHANNELS = 1024
_MAX_RATE = 1_000_000  # Hz
_MAX_CHUNKS = 10_000
_UNKNOWN_SIZE = 0x7FFF0000  # bytes: writers that could not seek leave at least this number in the data chunk


class WavInfo(NamedTuple):
    """The contents of a WAV header, checked against the file."""

    tag: int  # PCM or IEEE_FLOAT
    channels: int
    sample_rate: int  # Hz
    bits: int  # of one sample
    data_start: int  # bytes from the start of the file
    frames: int  # present in the file
    declared_frames: int  # declared in the header; more than ``frames`` if the file is truncated

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame: one sample of every channel."""
        return self.channels * self.bits // 8


def wav_info(source: Source) -> WavInfo:
    """Read and check the header of a WAV file. Raises ``DataError``, and ``OSError`` if it cannot be opened."""
    with _open(source) as (file, base, size):
        return _header(file, base, size, str(source))


def read_wav(source: Source, start: int = 0, frames: int | None = None) -> tuple[NDArray[np.generic], WavInfo]:
    """Frames ``[start, start + frames)``, or fewer if the file ends earlier: ``[n, channels]`` in the file's own type.

    24-bit samples are returned as int32, shifted left by 8 bits. Raises ``DataError``, and ``OSError`` on failed reads.
    """
    with _open(source) as (file, base, size):
        info = _header(file, base, size, str(source))
        start = min(max(start, 0), info.frames)
        count = info.frames - start if frames is None else max(0, min(frames, info.frames - start))
        raw = np.empty(count * info.frame_bytes, np.uint8)  # count is bounded by the size of the file
        file.seek(base + info.data_start + start * info.frame_bytes)
        got = file.readinto(raw.data) if raw.size else 0
    if got != raw.size:
        raise DataError(f"wav: {source}: {raw.size} bytes of samples wanted, {got} read; the file changed meanwhile")
    return _samples(raw, info), info


def write_wav(path: str | Path, samples: NDArray[np.int16], sample_rate: int = 16000) -> None:
    """Write int16 ``[N]`` or ``[N, channels]`` as 16-bit PCM. Raises ``TypeError`` for other arrays."""
    Path(path).write_bytes(wav_bytes(samples, sample_rate))


def wav_bytes(samples: NDArray[np.int16], sample_rate: int = 16000) -> bytes:
    """The WAV file of int16 ``[N]`` or ``[N, channels]``, 16-bit PCM. Raises ``TypeError`` for other arrays."""
    if samples.dtype != np.int16 or samples.ndim not in (1, 2):
        raise TypeError(f"write_wav: want int16 [N] or [N, channels], got {samples.dtype} {list(samples.shape)}")
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    data = np.ascontiguousarray(samples, dtype="<i2").tobytes()
    form = struct.pack("<HHIIHH", PCM, channels, sample_rate, sample_rate * channels * 2, channels * 2, 16)
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data


@contextmanager
def _open(source: Source) -> Iterator[tuple[io.BufferedReader, int, int]]:
    """Open a source for reading: the file, the source's first byte in it, and the source's number of bytes."""
    span = source if isinstance(source, Span) else None
    with open_plain(source.path if isinstance(source, Span) else source) as file:
        total = os.fstat(file.fileno()).st_size
        base = min(span.start, total) if span else 0
        yield file, base, min(span.size, total - base) if span else total


def _header(file: io.BufferedReader, base: int, size: int, name: str) -> WavInfo:
    """Read the chunks up to the samples. Raises ``DataError``."""
    file.seek(base)
    riff = file.read(min(12, size))
    if len(riff) < 12 or riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        raise DataError(f"wav: {name}: no RIFF/WAVE header in its {size} bytes; the file is not a WAV file, or is cut")
    position, form = 12, None
    for _ in range(_MAX_CHUNKS):
        file.seek(base + position)
        head = file.read(min(8, max(0, size - position)))
        if len(head) < 8:
            raise DataError(f"wav: {name}: no {'data' if form else 'fmt'} chunk in its {size} bytes")
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        position += 8
        if kind == b"fmt ":
            form = _format(file.read(min(length, 40, size - position)), name)
        elif kind == b"data":
            if form is None:
                raise DataError(f"wav: {name}: its data chunk comes before a fmt chunk")
            return _located(form, position, length, size - position)
        position += length + (length & 1)
    raise DataError(f"wav: {name}: no data chunk among its first {_MAX_CHUNKS} chunks")


def _format(body: bytes, name: str) -> WavInfo:
    """Parse the fmt chunk: channels, rate and type of samples, without the data. Raises ``DataError``."""
    if len(body) < 16:
        raise DataError(f"wav: {name}: its fmt chunk has {len(body)} bytes, 16 or more are wanted")
    tag, channels, rate, _, block, bits = struct.unpack("<HHIIHH", body[:16])
    if tag == EXTENSIBLE:
        if len(body) < 40 or body[26:40] != _GUID_TAIL:
            raise UnreadWav(f"wav: {name}: its extensible format is cut or unknown; convert it to PCM")
        tag = int.from_bytes(body[24:26], "little")
    if not 1 <= channels <= _MAX_CHANNELS or not 1 <= rate <= _MAX_RATE:
        raise DataError(f"wav: {name}: the header says {channels} channels at {rate} Hz, which cannot be")
    if (tag, bits) not in _SAMPLE_TYPES or block * 8 != channels * bits:
        raise UnreadWav(
            f"wav: {name}: format tag {tag} with {bits} bits in blocks of {block} bytes is not read "
            "without soundfile; install nest-fn[audio], or convert it to PCM of 8 to 32 bits or float of 32 or 64"
        )
    return WavInfo(tag, channels, rate, bits, 0, 0, 0)


def _located(form: WavInfo, start: int, declared: int, available: int) -> WavInfo:
    """The format, completed by the samples' position and their declared and actual number."""
    if declared >= _UNKNOWN_SIZE and declared > available:
        declared = available
    width = form.frame_bytes
    return form._replace(data_start=start, frames=min(declared, available) // width, declared_frames=declared // width)


def _samples(raw: NDArray[np.uint8], info: WavInfo) -> NDArray[np.generic]:
    """Bytes to ``[n, channels]``."""
    if info.bits == 24:
        wide = np.zeros((raw.size // 3, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        return wide.view("<i4").reshape(-1, info.channels)
    return raw.view(_SAMPLE_TYPES[info.tag, info.bits]).reshape(-1, info.channels)
