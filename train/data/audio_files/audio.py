"""Reads an audio file, or a part of it, as int16 mono at a given sample rate.

WAV of PCM or float samples is read by ``wav.py``, all else by ``other_formats.py``. Integer samples of more than 16
bits lose their low bits; float samples are scaled by 2^15, rounded and clipped. Only the requested part is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nest_fn.audio.functions import resampler
from nest_fn.extras import has_extra
from nest_fn.files.inputs import open_plain
from nest_fn.train.errors import DataError

from .other_formats import MP3, SUFFIXES, decode, frames_of, open_other
from .remote import Remote, held_copy
from .wav import IEEE_FLOAT, Source, Span, UnreadWav, WavInfo, read_wav, wav_info

AUDIO_SUFFIXES = (".wav", *SUFFIXES)

Channel: TypeAlias = Literal["error", "mix", "first"] | int | tuple[int, ...]
"""How several channels are read: as an error, their mean, the first, that of an index, the mean of those of indices."""

_MP3_TOLERANCE = 0.5  # seconds: decoders disagree on the length of an MP3 file by the encoder's delay
_TOLERANCE = 2  # frames at the file's rate
_MIN_RATE = 1000  # Hz


class AudioInfo(NamedTuple):
    """The facts in a file's header."""

    frames: int
    sample_rate: int  # Hz
    channels: int
    format: str  # e.g. WAV/PCM_16

    @property
    def duration(self) -> float:
        """The duration in seconds."""
        return self.frames / self.sample_rate


def audio_info(source: Source | Remote, where: str = "") -> AudioInfo:
    """Read a file's header, and count the frames where it does not.

    Raises ``DataError`` that names the file and ``where`` (the manifest and line), also for a file without samples.
    """
    with _named(source, where) as source:
        info = _wav_header(source)
        if info is not None:
            _check_whole(info.frames, info.declared_frames)
            subtype = f"{'FLOAT' if info.tag == IEEE_FLOAT else 'PCM'}_{info.bits}"
            return _not_empty(AudioInfo(info.frames, info.sample_rate, info.channels, f"WAV/{subtype}"))
        with open_other(source) as file:
            name = f"{file.format}/{file.subtype}"
            return _not_empty(AudioInfo(frames_of(file), file.samplerate, file.channels, name))


def _not_empty(info: AudioInfo) -> AudioInfo:
    if info.frames == 0:
        raise DataError("the file is empty: its header is followed by no samples; leave it out")
    return info


def read_audio(
    source: Source | Remote,
    offset: float = 0.0,
    duration: float | None = None,
    *,
    sample_rate: int = 16000,
    channel: Channel = "error",
    resample: bool = True,
    tolerance: float | None = None,
    rounding: float = 0.0,
    where: str = "",
) -> NDArray[np.int16]:
    """Seconds ``[offset, offset + duration)`` of a file as int16 ``[N]``; ``duration=None`` reads to the end.

    Both ends are rounded to the nearest frame. A file that ends more than ``tolerance`` seconds too early is an error
    (``None``: two frames, for MP3 0.5 s, and ``rounding`` seconds by which offset and duration may be off); within the
    tolerance the result is as short as the file. ``where`` is the manifest and line, for messages (``train.jsonl:12``).
    Raises ``DataError``, and ``UsageError`` if soundfile is needed and missing.
    """
    with _named(source, where) as source:
        frames, rate = _read_frames(source, offset, duration, tolerance, rounding)
        mono = _one_channel(frames, channel)
        if rate == sample_rate:
            return _to_int16(mono)
        if not resample:
            raise DataError(f"{rate} Hz, {sample_rate} Hz wanted; set data.resample=true or convert the file")
        return _resample(mono, rate, sample_rate)


# Reading -------------------------------------------------------------------------------------------------------------


def _read_frames(
    source: Source, offset: float, duration: float | None, tolerance: float | None, rounding: float
) -> tuple[NDArray[Any], int]:
    """The requested frames, ``[n, channels]``, and their rate in Hz."""
    info = _wav_header(source)
    if info is not None:
        start, count = _range(offset, duration, info.sample_rate)
        frames, _ = read_wav(source, start, count)
        if count is None:
            _check_whole(info.frames, info.declared_frames)
        _check_length(len(frames), start, count, info.sample_rate, _allowed(tolerance, rounding, info.sample_rate))
        return frames, info.sample_rate
    with open_other(source) as file:
        start, count = _range(offset, duration, file.samplerate)
        frames, expected = decode(file, start, count)
        if tolerance is None and file.format in MP3:
            tolerance = _MP3_TOLERANCE
        _check_length(len(frames), start, expected, file.samplerate, _allowed(tolerance, rounding, file.samplerate))
        return frames, file.samplerate


def _range(offset: float, duration: float | None, rate: int) -> tuple[int, int | None]:
    """Seconds to (first frame, number of frames)."""
    start = round(offset * rate)
    return start, None if duration is None else round((offset + duration) * rate) - start


def _allowed(tolerance: float | None, rounding: float, rate: int) -> float:
    """Seconds by which a file may end too early."""
    return _TOLERANCE / rate + rounding if tolerance is None else tolerance


def _check_length(got: int, start: int, expected: int | None, rate: int, tolerance: float) -> None:
    """Raise ``DataError`` for a file that ends too early."""
    if got == 0:
        raise DataError(f"no samples at {start / rate:.3f} s; the file is empty or ends before that")
    missing = (expected or 0) - got
    if missing > tolerance * rate + 1e-6:
        raise DataError(
            f"{expected} frames wanted from {start / rate:.3f} s on, {got} are there ({missing / rate:.3f} s missing); "
            "the file is cut or the manifest's duration is wrong; repair it or set data.duration_tolerance"
        )


def _check_whole(frames: int, declared: int) -> None:
    """Raise ``DataError`` for a WAV file that has fewer frames than its header declares."""
    if declared > frames + _TOLERANCE:
        raise DataError(f"the header declares {declared} frames, {frames} are there; the file is cut")


def _wav_header(source: Source) -> WavInfo | None:
    """The header of a file that ``wav.py`` reads, by its content and not its suffix; None for one that soundfile reads.

    Raises ``DataError`` for a file that is cut.
    """
    path, start = (source.path, source.start) if isinstance(source, Span) else (source, 0)
    with open_plain(path) as file:
        file.seek(start)
        magic = file.read(4)
    if len(magic) < 4:
        raise DataError(f"the file has {len(magic)} bytes")
    if magic != b"RIFF":
        return None
    try:
        return wav_info(source)
    except UnreadWav:
        if has_extra("soundfile"):
            return None
        raise


@contextmanager
def _named(source: Source | Remote, where: str) -> Iterator[Source]:
    """The file, or a remote one's copy; every error becomes a ``DataError`` that begins with ``where`` and the file."""
    try:
        if isinstance(source, Remote):
            with held_copy(source) as path:
                yield path
        else:
            yield source
    except FileNotFoundError as error:
        raise DataError(f"{_head(source, where)}: no such file; correct the path or make the manifest anew") from error
    except OSError as error:
        raise DataError(f"{_head(source, where)}: {error.strerror or error}") from error
    except DataError as error:
        told = str(error).removeprefix(f"{source}: ")
        raise DataError(f"{_head(source, where)}: {told}") from error
    except ValueError as error:  # an embedded null byte in a path
        raise DataError(f"{_head(source, where)}: {error}") from error


def _head(source: Source | Remote, where: str) -> str:
    """The manifest and line, and the absolute path."""
    path = str(source) if isinstance(source, Span | Remote) else str(Path(source).absolute())
    return f"{where}: {path}" if where not in ("", path) else path


# Samples -------------------------------------------------------------------------------------------------------------


def _one_channel(frames: NDArray[Any], channel: Channel) -> NDArray[Any]:
    """Choose or mix channels, ``[n, channels] -> [n]``. Raises ``DataError``, also for samples that are not finite."""
    channels = frames.shape[1]
    if frames.dtype.kind == "f" and not np.isfinite(frames).all():
        raise DataError(
            f"{int(np.count_nonzero(~np.isfinite(frames)))} samples are NaN or infinite; make the file anew"
        )
    if channel == "first" or (channels == 1 and channel in ("error", "mix")):
        return frames[:, 0]
    if channel == "mix":
        return _mix(frames)
    if channel == "error":
        raise DataError(f"{channels} channels, one wanted; set data.channel to mix, first or the index of a channel")
    chosen = channel if isinstance(channel, tuple) else (channel,)
    if not chosen or not all(isinstance(one, int) and 0 <= one < channels for one in chosen):
        raise DataError(
            f"channel {channel!r} asked of {channels}; data.channel is error, mix, first or an index from 0, a line's "
            "channel an index or a list of them"
        )
    return frames[:, chosen[0]] if len(chosen) == 1 else _mix(frames[:, list(chosen)])


def _mix(frames: NDArray[Any]) -> NDArray[Any]:
    """The mean of the channels in their own dtype, rounded if that is an integer type."""
    mean: NDArray[Any] = (frames / frames.shape[1]).sum(axis=1)  # divided first, so that no float overflows
    return mean if frames.dtype.kind == "f" else np.rint(mean).astype(frames.dtype)


def _to_int16(samples: NDArray[Any]) -> NDArray[np.int16]:
    """Samples of any WAV type to int16: the high bits of integers, floats rounded and clipped."""
    if samples.dtype == np.int16:
        return np.ascontiguousarray(samples)
    if samples.dtype == np.uint8:
        shifted: NDArray[np.int16] = (samples.astype(np.int16) - 128) << 8
        return shifted
    if samples.dtype.kind == "i":
        return (samples >> 16).astype(np.int16)
    return np.rint(_scaled(samples)).astype(np.int16)


def _scaled(samples: NDArray[Any]) -> NDArray[np.float32]:
    """Samples as float32, scaled and clipped to the range of int16."""
    if samples.dtype.kind != "f":
        return _to_int16(samples).astype(np.float32)
    clipped: NDArray[np.float32] = (np.clip(samples, -1.0, 32767 / 32768) * 32768).astype(np.float32)
    return clipped


def _resample(samples: NDArray[Any], rate: int, target: int) -> NDArray[np.int16]:
    """Windowed-sinc resampling with torchaudio's default kernel, in float32. Raises ``DataError`` below 1 kHz."""
    if rate < _MIN_RATE:  # resampling from such a rate would make a small file very large
        raise DataError(f"the header says {rate} Hz, no less than {_MIN_RATE} Hz is resampled")
    with torch.no_grad():
        out: Tensor = _resampler(rate, target)(torch.from_numpy(_scaled(samples))[None])[0]
    return np.asarray(out.round_().clamp_(-32768, 32767).to(torch.int16).numpy())


@lru_cache(maxsize=16)
def _resampler(rate: int, target: int) -> Callable[[Tensor], Tensor]:
    """The resampler with its kernel, cached for each pair of rates."""
    return resampler(rate, target)
