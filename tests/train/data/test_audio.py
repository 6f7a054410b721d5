"""Reading audio: real files in many encodings, and faults A1 to A10, B3, G4, G6."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

from nest_fn.train.data.audio_files.audio import audio_info, read_audio
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.errors import DataError, UsageError

soundfile = pytest.importorskip("soundfile", reason="the optional package soundfile reads FLAC, Ogg and MP3")

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real recordings of ../shared/data are absent")
FORMATS = [json.loads(x) for x in (DATA / "formats.jsonl").read_text().splitlines()] if DATA.is_dir() else []


def _tone(seconds: float = 1.0, rate: int = 16000, hertz: float = 440.0) -> np.ndarray:
    return np.round(12000 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.int16)


def _noise(count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(3)).integers(-20000, 20000, count).astype(np.int16)


@needs_data
@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: Path(entry["audio_filepath"]).name)
def test_real_files_equal_their_16_khz_twins(entry: dict) -> None:
    got = read_audio(DATA / entry["audio_filepath"], 0.0, entry["duration"], channel="mix")
    twin = read_audio(DATA / entry["reference"])
    if entry["note"] == "same samples as the reference":
        assert np.array_equal(got, twin)
        return
    assert abs(len(got) - len(twin)) <= 16
    count = min(len(got), len(twin))
    a, b = got[:count].astype(np.float64), twin[:count].astype(np.float64)
    assert (a @ b) / np.sqrt((a @ a) * (b @ b)) > 0.99
    assert audio_info(DATA / entry["audio_filepath"]).duration == pytest.approx(entry["duration"], abs=1e-3)


@needs_data
@pytest.mark.parametrize("kind", ["pcm16.wav", "float32.wav", "pcm24.flac"])
def test_a_part_equals_the_same_part_of_the_whole(kind: str) -> None:
    path = DATA / "formats" / f"6385-220959-0000.{kind}"
    whole = read_audio(path)
    assert np.array_equal(read_audio(path, 1.25, 0.5), whole[20000:28000])
    assert np.array_equal(read_audio(path, 3.0), whole[48000:])


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_all_sample_types_agree(tmp_path: Path, subtype: str) -> None:
    samples = _noise(2000) // 256 * 256
    written = samples if subtype.startswith("PCM") else samples / 32768
    soundfile.write(tmp_path / "a.wav", written, 16000, subtype=subtype)
    assert np.array_equal(read_audio(tmp_path / "a.wav"), samples)


def test_float_is_rounded_and_clipped(tmp_path: Path) -> None:
    values = np.array([0.0, 0.6 / 32768, -0.6 / 32768, 1.0, 1.5, -1.0, -7.0, 1e30])
    soundfile.write(tmp_path / "a.wav", values, 16000, subtype="DOUBLE")
    assert read_audio(tmp_path / "a.wav").tolist() == [0, 1, -1, 32767, 32767, -32768, -32768, 32767]


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
def test_resampling_is_torchaudios(tmp_path: Path, rate: int) -> None:
    samples = _noise(rate // 4)
    write_wav(tmp_path / "a.wav", samples, rate)
    wave = torch.from_numpy(samples.astype(np.float64))
    wanted = torchaudio.functional.resample(wave, rate, 16000).round().clamp(-32768, 32767).numpy()
    got = read_audio(tmp_path / "a.wav")
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1
    assert (got == wanted).mean() > 0.99
    with pytest.raises(DataError, match=f"{rate} Hz, 16000 Hz wanted.*resample"):
        read_audio(tmp_path / "a.wav", resample=False)


def test_resampling_keeps_a_tone(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", _tone(1.0, 44100), 44100)
    got, want = read_audio(tmp_path / "a.wav").astype(float)[500:-500], _tone().astype(float)[500:-500]
    assert np.abs(got - want).max() < 40


@pytest.mark.parametrize("rate", [1, 999])
def test_senseless_rates_do_not_exhaust_memory(tmp_path: Path, rate: int) -> None:
    write_wav(tmp_path / "a.wav", _tone(0.1), rate)
    with pytest.raises(DataError, match="Hz"):
        read_audio(tmp_path / "a.wav")


def test_channels(tmp_path: Path) -> None:
    stereo = np.stack([_noise(100), _noise(200)[100:]], axis=1)
    write_wav(tmp_path / "a.wav", stereo)
    path = tmp_path / "a.wav"
    assert np.array_equal(read_audio(path, channel="first"), stereo[:, 0])
    assert np.array_equal(read_audio(path, channel=1), stereo[:, 1])
    assert np.array_equal(read_audio(path, channel="mix"), np.rint(stereo.mean(axis=1)).astype(np.int16))
    for channel in ("error", 2, -1):
        with pytest.raises(DataError, match="data.channel"):
            read_audio(path, channel=channel)  # type: ignore[arg-type]
    write_wav(tmp_path / "b.wav", stereo[:, 0])
    with pytest.raises(DataError, match="channel 1 asked of 1"):
        read_audio(tmp_path / "b.wav", channel=1)


def test_a_missing_file_is_named_with_its_place() -> None:
    with pytest.raises(DataError) as caught:
        read_audio("nowhere/a.wav", where="train.jsonl:7")
    assert str(caught.value).startswith(f"train.jsonl:7: {Path('nowhere/a.wav').absolute()}: no such file")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "raw"])
@pytest.mark.parametrize("content", [b"", b"RI", b"hello, this is a text and no audio\n" * 9, b"RIFF\x24\0\0\0WAVE"])
def test_files_that_are_no_audio(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    for read in (audio_info, read_audio):
        with pytest.raises(DataError, match=str(path)):
            read(path)


def test_a_header_without_samples(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.zeros(0, np.int16))
    with pytest.raises(DataError, match="empty"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_never_comes_through(tmp_path: Path, subtype: str, value: float) -> None:
    samples = np.zeros(100)
    samples[50] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype=subtype)
    with pytest.raises(DataError, match="1 samples are NaN or infinite"):
        read_audio(tmp_path / "a.wav")


def test_a_wav_cut_in_the_middle(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", _tone(2.0))
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:32022])
    with pytest.raises(DataError, match="32000 frames wanted .* 15989 are there"):
        read_audio(tmp_path / "a.wav", 0.0, 2.0)
    with pytest.raises(DataError, match="declares 32000 frames, 15989"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(DataError, match="declares 32000 frames"):
        audio_info(tmp_path / "a.wav")
    assert len(read_audio(tmp_path / "a.wav", 0.0, 0.5)) == 8000  # the part that is there


def test_two_frames_may_be_missing(tmp_path: Path) -> None:
    for suffix in ("wav", "flac"):
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, _tone(1.0), 16000)
        assert len(read_audio(path, 0.0, 16002 / 16000)) == 16000
        with pytest.raises(DataError, match="cut"):
            read_audio(path, 0.0, 16003 / 16000)
        assert len(read_audio(path, 0.0, 1.01, tolerance=0.02)) == 16000


@needs_data
def test_an_mp3_may_miss_half_a_second() -> None:
    path = DATA / "formats" / "6385-220959-0000.mp3"
    assert len(read_audio(path, 0.0, 3.905063 + 0.4)) == 62481
    with pytest.raises(DataError, match="cut"):
        read_audio(path, 0.0, 3.905063 + 0.6)


def test_damaged_flac(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", _noise(32000), 16000)
    whole = (tmp_path / "a.flac").read_bytes()
    path = tmp_path / "b.flac"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.flac"):
        read_audio(path, 0.0, 2.0)
    for place in range(4, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + b"\xff\0\xff\0" * 8 + whole[place + 32 :])
        with contextlib.suppress(DataError):
            assert len(read_audio(path)) <= 40000


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("duration", [None, 0.5])
def test_an_offset_beyond_the_end(tmp_path: Path, suffix: str, duration: float | None) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, _tone(1.0), 16000)
    for offset in (1.0, 5.0):
        with pytest.raises(DataError, match=r"a\.\w+: "):
            read_audio(path, offset, duration)


@given(st.integers(0, 15999), st.integers(1, 16000))
def test_every_range_of_frames(tmp_path_factory: pytest.TempPathFactory, start: int, count: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    samples = _noise(16000)
    for suffix in ("wav", "flac"):
        path = folder / f"range.{suffix}"
        if not path.exists():
            soundfile.write(path, samples, 16000)
        count = min(count, 16000 - start)
        got = read_audio(path, start / 16000, count / 16000)
        assert np.array_equal(got, samples[start : start + count])


@pytest.mark.parametrize("name", ["ä ö ü", "音声", "with space", "x" * 200, "a\udcffb", "%s{}"])
def test_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.flac"
    soundfile.write(tmp_path / "plain.flac", _tone(0.1), 16000)
    try:
        (tmp_path / "plain.flac").rename(path)
    except OSError:
        pytest.skip("the file system refuses the name")
    assert len(read_audio(path)) == 1600
    link = tmp_path / "link.flac"
    link.symlink_to(path)
    assert len(read_audio(link)) == 1600


def test_a_null_byte_in_a_name_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_audio("a\0b.wav")
    with pytest.raises(DataError):
        read_audio(tmp_path)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.flac", _tone(0.1), 16000)
    write_wav(tmp_path / "a.wav", _tone(0.1))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UsageError, match=r"nest-fn\[audio\]") as caught:
        read_audio(tmp_path / "a.flac")
    assert "\n" not in str(caught.value)
    assert len(read_audio(tmp_path / "a.wav")) == 1600
