"""The WAV reader against the standard library's ``wave`` and soundfile, and on bytes that mean harm."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.train.data.audio_files.audio import audio_info, read_audio
from nest_fn.train.data.audio_files.wav import Span, read_wav, wav_info, write_wav
from nest_fn.train.errors import DataError

soundfile = pytest.importorskip("soundfile", reason="the optional package soundfile is the oracle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wav")


def _bytes(path: Path, channels: int, width: int, rate: int, data: bytes) -> bytes:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path.read_bytes()


@given(st.integers(1, 3), st.sampled_from([1, 2, 3, 4]), st.integers(1, 200_000), st.binary(max_size=600), st.data())
def test_equals_the_standard_library(
    folder: Path, channels: int, width: int, rate: int, data: bytes, draw: st.DataObject
) -> None:
    data = data[: len(data) // (channels * width) * (channels * width)]
    path = folder / "a.wav"
    _bytes(path, channels, width, rate, data)
    frames = len(data) // (channels * width)
    start, count = draw.draw(st.integers(0, frames + 2)), draw.draw(st.integers(0, frames + 2))
    samples, info = read_wav(path, start, count)
    with wave.open(str(path), "rb") as file:
        assert (info.channels, info.sample_rate, info.bits, info.frames) == (
            file.getnchannels(), file.getframerate(), 8 * file.getsampwidth(), file.getnframes(),
        )  # fmt: skip
        file.setpos(min(start, frames))
        wanted = file.readframes(count)
    if width == 3:
        assert not (samples.view(np.uint8).reshape(-1, 4)[:, 0]).any()
        assert samples.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes() == wanted
    else:
        assert samples.tobytes() == wanted


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
def test_equals_soundfile(tmp_path: Path, subtype: str, container: str) -> None:
    noise = np.random.Generator(np.random.Philox(1)).uniform(-1, 1, (500, 2))
    soundfile.write(tmp_path / "a.wav", noise, 16000, format=container, subtype=subtype)
    samples, info = read_wav(tmp_path / "a.wav")
    if samples.dtype == np.uint8:
        samples = samples.astype(np.int32) - 128 << 24
    scale = 2.0 ** (8 * samples.dtype.itemsize - 1) if samples.dtype.kind == "i" else 1.0
    wanted, _ = soundfile.read(tmp_path / "a.wav", dtype="float64")
    assert np.array_equal(samples / scale, wanted)
    assert info.frames == 500 and info.frames == info.declared_frames


@given(st.lists(st.integers(-32768, 32767), max_size=50), st.integers(1, 3))
def test_written_files_read_back(folder: Path, values: list[int], channels: int) -> None:
    samples = np.array(values * channels, np.int16).reshape(-1, channels)
    write_wav(folder / "w.wav", samples[:, 0] if channels == 1 else samples, 8000)
    assert np.array_equal(read_wav(folder / "w.wav")[0], samples)
    with wave.open(str(folder / "w.wav")) as file:
        assert file.readframes(file.getnframes()) == samples.tobytes()


@settings(max_examples=300)
@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_give_a_data_error_or_samples(folder: Path, body: bytes, looks_right: bool) -> None:
    path = folder / "fuzz.wav"
    path.write_bytes(b"RIFF\0\0\0\0WAVE" + body if looks_right else body)
    _read_all(path)


@settings(max_examples=500)
@given(st.data())
def test_mutated_files_give_a_data_error_or_samples(folder: Path, data: st.DataObject) -> None:
    width, channels = data.draw(st.sampled_from([1, 2, 3, 4])), data.draw(st.integers(1, 2))
    raw = bytearray(_bytes(folder / "m.wav", channels, width, 16000, bytes(range(240))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 59))
        value = data.draw(st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x10", b"\x7f"]))
        raw[place : place + len(value)] = value
    (folder / "m.wav").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    _read_all(folder / "m.wav")


def _read_all(path: Path) -> None:
    size = path.stat().st_size
    try:
        samples, info = read_wav(path)
        assert samples.nbytes <= 4 * size and info.frames * info.frame_bytes <= size
    except DataError:
        pass
    try:
        assert read_audio(path, channel="mix").nbytes <= 64 * size
        audio_info(path)
    except DataError:
        pass


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0xFFFFFFF0, 0x7FFFFFFF])
def test_an_unknown_size_means_the_rest_of_the_file(tmp_path: Path, size: int) -> None:
    raw = bytearray(_bytes(tmp_path / "a.wav", 1, 2, 16000, bytes(200)))
    raw[40:44] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(raw)
    info = wav_info(tmp_path / "a.wav")
    assert info.frames == info.declared_frames == 100


def test_other_chunks_are_skipped(tmp_path: Path) -> None:
    raw = _bytes(tmp_path / "a.wav", 1, 2, 16000, b"abcd")
    odd = b"LIST" + struct.pack("<I", 3) + b"xyz\0"
    (tmp_path / "a.wav").write_bytes(raw[:12] + odd + raw[12:36] + odd + raw[36:])
    assert read_wav(tmp_path / "a.wav")[0].tobytes() == b"abcd"


@pytest.mark.parametrize(
    "change, message",
    [
        ({20: b"\x02\0"}, "format tag 2"),  # ADPCM
        ({22: b"\0\0"}, "0 channels"),
        ({24: b"\0\0\0\0"}, "at 0 Hz"),
        ({32: b"\x07\0"}, "blocks of 7"),
        ({8: b"WAVF"}, "no RIFF/WAVE header"),
        ({36: b"junk"}, "no data chunk"),
        ({12: b"junk"}, "before a fmt chunk"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: dict[int, bytes], message: str) -> None:
    raw = bytearray(_bytes(tmp_path / "a.wav", 1, 2, 16000, bytes(20)))
    for place, value in change.items():
        raw[place : place + len(value)] = value
    (tmp_path / "a.wav").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        wav_info(tmp_path / "a.wav")


def test_a_span_is_a_file(tmp_path: Path) -> None:
    raw = _bytes(tmp_path / "a.wav", 1, 2, 16000, bytes(range(40)))
    (tmp_path / "b.bin").write_bytes(b"before" + raw + b"after" * 10)
    span = Span(str(tmp_path / "b.bin"), 6, len(raw), "a.wav")
    assert read_wav(span, 3, 5)[0].tobytes() == bytes(range(6, 16))
    assert read_audio(span).tobytes() == bytes(range(40))


def test_only_int16_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="int16"):
        write_wav(tmp_path / "a.wav", np.zeros(3, np.float32))  # type: ignore[arg-type]
