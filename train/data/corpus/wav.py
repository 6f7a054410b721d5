"""PCM and float WAV files, read without trust in their headers, and 16-bit ones written.

Every chunk is checked against the bytes that are there, and nothing is allocated from a number in the header. A file
may also be a byte range of another one (a member of a tar archive): see ``Span``.
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
    """Bytes ``[start, start + size)`` of a file: a member of a tar archive, read in place. ``name`` is the member's."""

    path: str
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}[{self.name}]"


Source: TypeAlias = str | Path | Span
"""Where the bytes of one audio file are."""

PCM, IEEE_FLOAT, EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
_GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")  # of every SubFormat that holds a plain format tag
_SAMPLE_TYPES = {(PCM, 8): "u1", (PCM, 16): "<i2", (PCM, 24): "u1", (PCM, 32): "<i4"}
_SAMPLE_TYPES |= {(IEEE_FLOAT, 32): "<f4", (IEEE_FLOAT, 64): "<f8"}
_MAX_CHANNELS = 1024
_MAX_RATE = 1_000_000  # Hz
_MAX_CHUNKS = 10_000
_UNKNOWN_SIZE = 0x7FFF0000  # bytes: a writer that could not seek leaves a number from here on in the data chunk


class WavInfo(NamedTuple):
    """What a WAV header says, after it was checked against the file."""

    tag: int  # PCM or IEEE_FLOAT
    channels: int
    sample_rate: int  # Hz
    bits: int  # of one sample
    data_start: int  # bytes from the start of the file
    frames: int  # that are in the file
    declared_frames: int  # that the header promises; more than ``frames`` where the file was cut

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame: one sample of every channel."""
        return self.channels * self.bits // 8


def wav_info(source: Source) -> WavInfo:
    """Read and check the header of a WAV file. Raises ``DataError``, and ``OSError`` if it cannot be opened."""
    with _open(source) as (file, base, size):
        return _header(file, base, size, str(source))


def read_wav(source: Source, start: int = 0, frames: int | None = None) -> tuple[NDArray[np.generic], WavInfo]:
    """Frames ``[start, start + frames)``, as many of them as there are: ``-> [n, channels]`` in the file's own type.

    24-bit samples come as int32, shifted up by 8 bits. Raises ``DataError``, and ``OSError`` on failed reads.
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
    """Write int16 ``[N]`` or ``[N, channels]`` as 16-bit PCM."""
    if samples.dtype != np.int16 or samples.ndim not in (1, 2):
        raise TypeError(f"write_wav: want int16 [N] or [N, channels], got {samples.dtype} {list(samples.shape)}")
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    data = np.ascontiguousarray(samples, dtype="<i2").tobytes()
    form = struct.pack("<HHIIHH", PCM, channels, sample_rate, sample_rate * channels * 2, channels * 2, 16)
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data))
    Path(path).write_bytes(b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data)


@contextmanager
def _open(source: Source) -> Iterator[tuple[io.BufferedReader, int, int]]:
    """Open a source for reading: the file, the first byte of the source in it, and its number of bytes."""
    span = source if isinstance(source, Span) else None
    with open_plain(source.path if isinstance(source, Span) else source) as file:
        total = os.fstat(file.fileno()).st_size
        base = min(span.start, total) if span else 0
        yield file, base, min(span.size, total - base) if span else total


def _header(file: io.BufferedReader, base: int, size: int, name: str) -> WavInfo:
    """Walk the chunks up to the samples."""
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
    """The fmt chunk: channels, rate and type of samples, with nothing known of the data yet."""
    if len(body) < 16:
        raise DataError(f"wav: {name}: its fmt chunk has {len(body)} bytes, 16 or more are wanted")
    tag, channels, rate, _, block, bits = struct.unpack("<HHIIHH", body[:16])
    if tag == EXTENSIBLE:
        if len(body) < 40 or body[26:40] != _GUID_TAIL:
            raise DataError(f"wav: {name}: its extensible format is cut or unknown; convert it to PCM")
        tag = int.from_bytes(body[24:26], "little")
    if not 1 <= channels <= _MAX_CHANNELS or not 1 <= rate <= _MAX_RATE:
        raise DataError(f"wav: {name}: the header says {channels} channels at {rate} Hz, which cannot be")
    if (tag, bits) not in _SAMPLE_TYPES or block * 8 != channels * bits:
        raise DataError(
            f"wav: {name}: format tag {tag} with {bits} bits in blocks of {block} bytes is not read; "
            "convert it to PCM of 8, 16, 24 or 32 bits or float of 32 or 64"
        )
    return WavInfo(tag, channels, rate, bits, 0, 0, 0)


def _located(form: WavInfo, start: int, declared: int, available: int) -> WavInfo:
    """The format, with where the samples are and how many of the declared ones exist."""
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
