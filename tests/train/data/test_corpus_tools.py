"""Scan, validate, describe and pack data sets (faults A5, A8, A11, G4)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nest_fn.config.training import DataConfig
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.manifest import load_manifest
from nest_fn.train.data.corpus_tools import scan, shard, stats, validate
from nest_fn.train.errors import DataError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real recordings of ../shared/data are absent")
CONFIG = DataConfig(min_duration=0.0, num_workers=2)


def _noise(seconds: float) -> np.ndarray:
    return np.random.Generator(np.random.Philox(1)).integers(-99, 99, round(seconds * 16000)).astype(np.int16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "audio" / "sub dir").mkdir(parents=True)
    write_wav(tmp_path / "audio" / "b.wav", _noise(2.0))
    write_wav(tmp_path / "audio" / "sub dir" / "ä.WAV", np.stack([_noise(1.0)] * 2, 1), 8000)
    (tmp_path / "audio" / "a.wav").symlink_to(tmp_path / "audio" / "b.wav")
    (tmp_path / "audio" / "sub dir" / "loop").symlink_to(tmp_path / "audio")
    (tmp_path / "audio" / "notes.txt").write_text("no audio")
    (tmp_path / "audio" / "bad.flac").write_text("no audio either")
    return tmp_path


def test_scan(folder: Path) -> None:
    pytest.importorskip("soundfile", reason="the optional package soundfile says what is wrong with FLAC")
    report = scan(folder / "audio", folder / "m.jsonl", hashes=True)
    assert report.checked == 4 and len(report.problems) == 1 and "bad.flac" in report.problems[0] and not report.ok
    lines = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    assert [line["audio_filepath"] for line in lines] == ["audio/a.wav", "audio/b.wav", "audio/sub dir/ä.WAV"]
    assert lines[1] | {"sha256": ""} == {
        "audio_filepath": "audio/b.wav", "duration": 2.0, "sample_rate": 16000, "sha256": "",
    }  # fmt: skip
    assert lines[2]["num_channels"] == 2 and lines[2]["duration"] == 2.0 and lines[2]["sample_rate"] == 8000
    assert len(load_manifest(folder / "m.jsonl")) == 3


def test_scan_of_nothing(tmp_path: Path) -> None:
    for place, message in ((tmp_path, "no readable audio"), (tmp_path / "none", "not a folder")):
        with pytest.raises(DataError, match=message):
            scan(place, tmp_path / "m.jsonl")


def test_validate_reports_everything(folder: Path) -> None:
    (folder / "audio" / "bad.flac").unlink()
    manifest = str(folder / "m.jsonl")
    scan(folder / "audio", manifest, hashes=True)
    mixed = DataConfig(min_duration=0.0, channel="mix", num_workers=2)
    assert validate([manifest], mixed, hashes=True).ok
    report = validate([manifest], CONFIG)
    assert report.checked == 3 and len(report.problems) == 1 and "m.jsonl:3: " in report.problems[0]
    samples = _noise(2.0)
    samples[77] += 1
    write_wav(folder / "audio" / "b.wav", samples)  # no reader could notice this
    assert validate([manifest], mixed).ok
    changed = validate([manifest], mixed, hashes=True)
    assert len(changed.problems) == 2 and "the file changed" in changed.problems[0]  # a.wav is a link to it
    (folder / "audio" / "b.wav").write_bytes((folder / "audio" / "b.wav").read_bytes()[:5000])
    assert len(validate([manifest], mixed).problems) == 2
    scan(folder / "audio" / "sub dir", manifest, overwrite=True)
    assert validate([manifest], mixed, hashes=True).without_hash == 1


def test_stats(tmp_path: Path) -> None:
    loud = np.full(32000, 1000, np.int16)
    loud[:320] = 32767
    loud[320:400] = -32768
    write_wav(tmp_path / "loud.wav", loud)
    write_wav(tmp_path / "quiet.wav", np.zeros(16000, np.int16))
    write_wav(tmp_path / "low.wav", _noise(1.5), 8000)
    scan(tmp_path, tmp_path / "m.jsonl")
    found = stats([str(tmp_path / "m.jsonl")], CONFIG)
    assert found["utterances"] == 3 and found["hours"] == pytest.approx(6 / 3600)
    assert found["duration_s"] == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert found["sample_rates"] == {"16000": 2, "8000": 1} and found["formats"] == {"WAV/PCM_16": 3}
    assert found["clipped"] == 1 and found["silent"] == 1 and found["unreadable"] == 0
    assert found["clipped_share"] == pytest.approx(400 / 32000 / 3)
    assert 0 < found["plan"]["efficiency"] <= 1 and found["plan"]["batches"] >= 1
    json.dumps(found)
    small = stats([str(tmp_path / "m.jsonl")], DataConfig(batch_seconds=2.0, min_duration=0.0))
    assert "cannot hold" in small["plan"]["error"]


def test_stats_counts_what_it_cannot_read(folder: Path) -> None:
    (folder / "audio" / "bad.flac").unlink()
    scan(folder / "audio", folder / "m.jsonl")
    (folder / "audio" / "b.wav").write_bytes(b"")
    found = stats([str(folder / "m.jsonl")], CONFIG)
    assert found["unreadable"] == 2 and found["channels"] == {"2": 1}


def test_shard(folder: Path) -> None:
    (folder / "audio" / "bad.flac").unlink()
    scan(folder / "audio", folder / "m.jsonl")
    written = shard([str(folder / "m.jsonl")], CONFIG, folder / "tars", 2)
    pattern = [str(folder / "tars" / "audio_{0..1}.tar")]
    assert len(load_manifest(written, shards=pattern)) == 3
    assert validate([str(written)], DataConfig(channel="mix", num_workers=2), shards=pattern).ok


@needs_data
@pytest.mark.parametrize("name, channel", [("noise", "error"), ("formats", "mix"), ("rir", "error"), ("jfk", "error")])
def test_real_data_is_whole(name: str, channel: str) -> None:
    pytest.importorskip("soundfile", reason="the optional package soundfile reads FLAC, Ogg and MP3")
    config = DataConfig(min_duration=0.0, channel=channel, num_workers=2)  # type: ignore[arg-type]
    assert validate([str(DATA / f"{name}.jsonl")], config).problems == ()


@pytest.mark.parametrize("target", ["relative", "absolute", "through a link"])
def test_a_manifest_is_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Written in one folder, read from another, and moved together with its audio."""
    real = tmp_path / "one" / "real"
    (real / "audio").mkdir(parents=True)
    (real / "lists").mkdir()
    write_wav(real / "audio" / "a.wav", _noise(1.0))
    (tmp_path / "link").symlink_to(real / "lists")
    monkeypatch.chdir(real)
    scan(
        "audio",
        {"relative": "lists/m.jsonl", "absolute": real / "lists" / "m.jsonl"}.get(
            target, tmp_path / "link" / "m.jsonl"
        ),
    )
    monkeypatch.chdir(tmp_path)
    assert (real / "lists" / "m.jsonl").read_text().count('"../audio/a.wav"') == 1
    for place in (real / "lists", tmp_path / "link", Path("link")):
        assert validate([str(place / "m.jsonl")], CONFIG).ok
    packed = shard([str(tmp_path / "link" / "m.jsonl")], CONFIG, "packed", 1)
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "packed").rename(tmp_path / "moved")
    assert packed == Path("packed/manifest.jsonl")
    monkeypatch.chdir(tmp_path / "two")
    assert validate([str(tmp_path / "two" / "real" / "lists" / "m.jsonl")], CONFIG).ok
    assert validate([str(tmp_path / "moved" / "manifest.jsonl")], CONFIG, shards=["../moved/audio_0.tar"]).ok
