"""Audio and manifests as people bring them: the rows of reports by users of such trainers, and their kinds.

Each case is judged by every command in the same way: what ``data validate`` passes, a run reads.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn import Config, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.audio import audio_info, read_audio
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.columns import half_units
from nest_fn.train.data.corpus.manifest import load_manifest, manifest_files
from nest_fn.train.errors import DataError

Captured = pytest.CaptureFixture[str]
NOISE = 0.1 * np.random.default_rng(0).standard_normal(16000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, cfg = tmp_path_factory.mktemp("field") / "model", Config.preset("tiny", ["encoder.n_layers=1"])
    checkpoint.save(folder, *init(key(0), cfg), cfg)
    return str(folder)


def lines(path: Path, *entries: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def rate(folder: Path) -> str:
    """11: a rate whose ratio to 16 kHz is fine."""
    soundfile.write(folder / "r.wav", NOISE, 44056)
    return lines(folder / "m.jsonl", {"audio_filepath": "r.wav"})


def unknown_length(folder: Path) -> str:
    """15: a FLAC whose header does not know the number of samples, as of a writer that could not seek."""
    soundfile.write(folder / "u.flac", NOISE, 16000)
    raw = bytearray((folder / "u.flac").read_bytes())
    raw[21] &= 0xF0
    raw[22:26], raw[26:42] = bytes(4), bytes(16)
    (folder / "u.flac").write_bytes(raw)
    return lines(folder / "m.jsonl", {"audio_filepath": "u.flac"}, {"audio_filepath": "u.flac", "offset": 0.5})


def rounded(folder: Path) -> str:
    """23: durations with fewer decimals than the file has samples for."""
    entries = []
    for number, samples in enumerate((15935, 15999, 15990, 15921)):  # 0.9959, 0.9999, 0.9994, 0.9951 s
        write_wav(folder / f"{number}.wav", np.full(samples, 100, np.int16))
        entries.append({"audio_filepath": f"{number}.wav", "duration": 1.0 if number else 0.996})
    return lines(folder / "m.jsonl", *entries)


def one_sample(folder: Path) -> str:
    """9: the shortest file."""
    soundfile.write(folder / "one.wav", np.array([0.1]), 16000)
    return lines(folder / "m.jsonl", {"audio_filepath": "one.wav"})


def companded(folder: Path) -> str:
    """25: WAV of mu-law, A-law and ADPCM."""
    kinds = ("ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610")
    for kind in kinds:
        soundfile.write(folder / f"{kind}.wav", NOISE, 16000, subtype=kind)
    part = {"audio_filepath": "GSM610.wav", "offset": 0.5}  # cannot be sought in
    return lines(folder / "m.jsonl", *({"audio_filepath": f"{kind}.wav"} for kind in kinds), part)


def containers(folder: Path) -> str:
    """Other containers that soundfile reads."""
    kinds = (("AIFF", "PCM_16", "aiff"), ("W64", "PCM_24", "w64"), ("CAF", "ALAC_16", "caf"), ("OGG", "OPUS", "opus"),
             ("AU", "ULAW", "au"), ("RF64", "PCM_16", "wav"), ("NIST", "PCM_16", "sph"))  # fmt: skip
    for form, kind, suffix in kinds:
        soundfile.write(folder / f"{form}.{suffix}", NOISE, 16000, format=form, subtype=kind)
    return lines(folder / "m.jsonl", *({"audio_filepath": f"{form}.{suffix}"} for form, _, suffix in kinds))


def sharded(folder: Path) -> str:
    """29: a range of manifests."""
    write_wav(folder / "a.wav", np.full(16000, 9, np.int16))
    write_wav(folder / "b.wav", np.full(16000, 9, np.int16))
    lines(folder / "manifest_0.json", {"audio_filepath": "a.wav", "duration": 1.0})
    lines(folder / "manifest_1.json", {"audio_filepath": "b.wav", "duration": 1.0})
    return str(folder / "manifest__OP_0..1_CL_.json")


def compressed(folder: Path) -> str:
    """31: a manifest that gzip compressed."""
    plain = Path(sharded(folder).replace("__OP_0..1_CL_", "_0"))
    (folder / "m.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return str(folder / "m.jsonl.gz")


def channels(folder: Path) -> str:
    """NeMo#14415: a line that chooses its channels; a text under that key is a label of the user's own."""
    sides = np.stack([np.full(16000, 100), np.full(16000, 300), np.full(16000, 500)], axis=1).astype(np.int16)
    soundfile.write(folder / "s.wav", sides, 16000)
    write_wav(folder / "a.wav", sides[:, 0])
    chosen = ({"channel": 1}, {"channel": 2}, {"channel": [0, 2]})
    return lines(folder / "m.jsonl", *({"audio_filepath": "s.wav", "duration": 1.0, **one} for one in chosen),
                 {"audio_filepath": "a.wav", "duration": 1.0, "channel": "telephone"})  # fmt: skip


def headless_mp3(folder: Path) -> str:
    """pytorch/audio#884: an MP3 cut from a stream, whose length can only be guessed from its first frames."""
    soundfile.write(folder / "whole.mp3", np.tile(NOISE, 6) * np.linspace(1, 0, 96000), 44100, format="MP3")
    raw = (folder / "whole.mp3").read_bytes()
    (folder / "part.mp3").write_bytes(raw[len(raw) // 3 :])
    return lines(folder / "m.jsonl", {"audio_filepath": "part.mp3"}, {"audio_filepath": "whole.mp3"})


def segments(folder: Path) -> str:
    """lhotse#1437, NeMo#10060, NeMo#15080: parts of a long file, with and without a duration."""
    write_wav(folder / "long.wav", np.tile((3000 * NOISE).astype(np.int16), 40))
    return lines(folder / "m.jsonl", {"audio_filepath": "long.wav", "offset": 0, "duration": 4.948},
                 {"audio_filepath": "long.wav", "offset": 38.221, "duration": 1.257},
                 {"audio_filepath": "long.wav", "offset": 39.0})  # fmt: skip


CASES = (
    headless_mp3,
    segments,
    rate,
    unknown_length,
    rounded,
    one_sample,
    companded,
    containers,
    sharded,
    compressed,
    channels,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_command_reads_it(
    case: Callable[[Path], str], model: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated, counted, trained on, extracted (20: by a path relative to the folder), the index validated again."""
    manifest = case(tmp_path)
    assert main(["data", "validate", manifest]) == 0 and ", 0 problems" in capsys.readouterr().out
    assert main(["data", "stats", manifest]) == 0 and json.loads(capsys.readouterr().out)["unreadable"] == 0
    monkeypatch.chdir(tmp_path)
    assert main(["extract", model, Path(manifest).name, "--out", "out"]) == 0
    found = [np.load(path) for path in (tmp_path / "out").glob("*.npy")]
    assert len(found) == len(load_manifest(manifest)) and all(np.isfinite(array).all() for array in found)
    assert main(["data", "validate", "out/index.jsonl"]) == 0
    train = [f"data.train={json.dumps(manifest)}", "data.min_duration=0", "data.noise=[]", "trainer.max_steps=1",
             "trainer.threads=1", "encoder.n_layers=1"]  # fmt: skip
    assert main(["pretrain", "-c", "tiny", *train, "--folder", str(tmp_path / "run")]) == 0


def test_scan_leaves_out_what_a_run_would_refuse(tmp_path: Path, capsys: Captured) -> None:
    """13: an empty file beside good ones, and one that is cut."""
    (tmp_path / "s").mkdir()
    soundfile.write(tmp_path / "s" / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "s" / "good.wav", NOISE, 16000)
    soundfile.write(tmp_path / "s" / "cut.flac", NOISE, 16000)
    whole = (tmp_path / "s" / "cut.flac").read_bytes()
    (tmp_path / "s" / "cut.flac").write_bytes(whole[: len(whole) // 2])
    unknown_length(tmp_path / "s")
    assert main(["data", "scan", str(tmp_path / "s"), str(tmp_path / "s.jsonl")]) == 3
    told = capsys.readouterr()
    assert "empty.wav: the file is empty" in told.err + told.out and "cut.flac" in told.err + told.out
    found = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert {line["audio_filepath"]: line["duration"] for line in found} == {"s/good.wav": 1.0, "s/u.flac": 1.0}
    assert main(["data", "validate", str(tmp_path / "s.jsonl")]) == 0


def test_channels_of_lines(tmp_path: Path) -> None:
    from nest_fn.train.data.dataset import open_dataset, read_utterance

    config = Config.preset("tiny", [f"data.train={channels(tmp_path)}"]).data
    dataset = open_dataset(config, 0)
    assert [int(read_utterance(dataset, index)[0]) for index in range(4)] == [300, 500, 300, 100]
    assert [dataset.manifest.identity(index) for index in (0, 2, 3)] == [
        "s.wav@0.000+1.000#1", "s.wav@0.000+1.000#0,2", "a.wav@0.000+1.000"
    ]  # fmt: skip
    assert len(set(dataset.manifest.utterance.tolist())) == 4
    for bad in (-1, [], [1, "x"], "1", True, 5000):
        manifest = lines(tmp_path / "bad.jsonl", {"audio_filepath": "s.wav", "duration": 1.0, "channel": bad})
        with pytest.raises(DataError, match="bad.jsonl:1: channel is"):
            load_manifest(manifest)


def test_a_cut_file_is_still_refused(tmp_path: Path) -> None:
    """23: the tolerance is half a unit of the last decimal and no more."""
    write_wav(tmp_path / "a.wav", np.full(15800, 100, np.int16))  # 0.9875 s
    for duration, code in ((1.0, 0), (0.99, 0), (0.988, 0), (0.993, 3), (1.1, 3), (0.9881, 3)):
        manifest = lines(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "duration": duration})
        assert main(["data", "validate", manifest]) == code, duration


def test_patterns_of_manifests_may_hold_commas() -> None:
    assert manifest_files("a_{0..1}.json, b_{x,y}.json,c.json") == [
        "a_0.json", "a_1.json", "b_x.json", "b_y.json", "c.json"
    ]  # fmt: skip


def test_a_compressed_archive_or_a_damaged_manifest_says_so(tmp_path: Path) -> None:
    manifest = compressed(tmp_path)
    raw = Path(manifest).read_bytes()
    (tmp_path / "cut.gz").write_bytes(raw[:-9])
    with pytest.raises(DataError, match="gzip data are damaged"):
        load_manifest(tmp_path / "cut.gz")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(10240)))
    with pytest.raises(DataError, match="compressed by gzip"):
        load_manifest(manifest, shards=[str(tmp_path / "a.tar.gz")])
    others = {
        "bzip2": bz2.compress(b"{}"),
        "xz": lzma.compress(b"{}"),
        "zstd": b"\x28\xb5\x2f\xfd\0\0",
        "a ZIP": b"PK\3\4\0\0",
        "a Parquet file: nest-fn data import": b"PAR1\0\0",
    }
    for name, content in others.items():
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(DataError, match=f"other is .*{name}"):
            load_manifest(tmp_path / "other")
        with pytest.raises(DataError, match="tar archive is .*, so that members cannot be read in place"):
            load_manifest(manifest, shards=[str(tmp_path / "other")])
    assert load_manifest(manifest).fields(0) == {"audio_filepath": "a.wav", "duration": 1.0}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rate=st.integers(1000, 384_000), samples=st.integers(1, 3000))
def test_any_sample_rate(tmp_path_factory: pytest.TempPathFactory, rate: int, samples: int) -> None:
    path = tmp_path_factory.getbasetemp() / "rate.wav"
    write_wav(path, (3000 * NOISE[:samples]).astype(np.int16), rate)
    assert audio_info(path).duration == samples / rate
    assert len(read_audio(path)) == math.ceil(samples * 16000 / rate)


@settings(deadline=None)
@given(st.integers(0, 10**7), st.integers(1, 5))
def test_half_a_unit_of_the_last_decimal(number: int, decimals: int) -> None:
    text = f"{number / 10**decimals:.{decimals}f}"
    shortest = max(len(text.rstrip("0").partition(".")[2]), 1)
    wanted = 0.5 * 10.0**-shortest if number else 0.0
    assert half_units(np.array([float(text)]))[0] == pytest.approx(wanted)
