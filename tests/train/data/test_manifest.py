"""Manifests: what is read, what is refused, and how (faults A1, A16, B1, B2, B5, G4)."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.manifest import load_manifest, manifest_files, write_manifest
from nest_fn.train.data.corpus.manifest_table import Manifest
from nest_fn.train.errors import DataError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real recordings of ../shared/data are absent")


def _write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def _load(path: Path | str | list[Path], **options: Any) -> Manifest:
    return load_manifest(path, **{"check_files": False, "workers": 0} | options)  # type: ignore[arg-type]


def _entry(name: str = "a.wav", **more: Any) -> dict[str, Any]:
    return {"audio_filepath": name, "duration": 2.0} | more


@needs_data
def test_the_real_manifests() -> None:
    manifest = load_manifest(DATA / "train.jsonl")
    assert len(manifest) == 1930 and manifest.duration.sum() / 60 == pytest.approx(38.0, abs=0.05)
    assert Path(str(manifest.source(0))).is_file()
    assert manifest.fields(0)["speaker"] == "librispeech-26"
    assert manifest.where(1) == f"{DATA / 'train.jsonl'}:2"
    both = load_manifest([DATA / "librispeech_train.jsonl", DATA / "fsdd_train.jsonl"])
    assert both.digest == manifest.digest and np.array_equal(both.utterance, manifest.utterance)
    kept = load_manifest(f"{DATA / 'train.jsonl'},{DATA / 'valid.jsonl'}", min_duration=1.0, max_duration=20.0)
    assert (kept.duration >= 1).all() and (kept.duration <= 20).all() and len(kept.dropped) == 2
    assert len(kept) + sum(count for _, count in kept.dropped) == 2170


def test_forms_of_lines(tmp_path: Path) -> None:
    text = (
        b'\xef\xbb\xbf{"audio_filepath": "a.wav", "duration": 2}\r\n\r\n   \n'
        b'{"audio_filename": "b.wav", "duration": "7"}\n\n'
        b'{"audio_filepath": "\xc3\xa4 \xe9\x9f\xb3.wav", "duration": 1e0, "offset": "0.5", "text": "hi", "lang": null}'
    )
    (tmp_path / "m.jsonl").write_bytes(text)
    manifest = _load(tmp_path / "m.jsonl")
    assert list(manifest.names) == ["a.wav", "b.wav", "ä 音.wav"]
    assert manifest.duration.tolist() == [2, 7, 1] and manifest.offset.tolist() == [0, 0, 0.5]
    assert manifest.line.tolist() == [1, 4, 6]
    assert manifest.fields(0) == {"audio_filepath": "a.wav", "duration": 2}
    assert manifest.fields(2)["text"] == "hi"


BAD = [
    ("{", "not a JSON object"),
    ("[1]", "not a JSON object but list"),
    ("[" * 100_000, "not a JSON object"),
    ('{"duration": ' + "9" * 5000 + ', "audio_filepath": "a"}', "not"),
    ("{}", "audio_filepath is missing"),
    ('{"audio_filepath": 3}', "a path is wanted"),
    ('{"audio_filepath": ""}', "empty"),
    ('{"audio_filepath": "a\\u0000"}', "null byte"),
    ('{"audio_filepath": "a\\ud800"}', "surrogate"),
    *[
        (f'{{"audio_filepath": "a", "{key}": {value}}}', key)
        for key in ("duration", "offset")
        for value in ("NaN", "-1", "Infinity", "1e999", '"x"', "true", "[1]", '"nan"')
    ],
    ('{"audio_filepath": "a", "duration": 0}', "not positive"),
    ('{"audio_filepath": "a", "duration": 1, "shard_id": -1}', "shard_id"),
    ('{"audio_filepath": "a", "duration": 1, "shard_id": 1.5}', "shard_id"),
]


@pytest.mark.parametrize("line, message", BAD, ids=range(len(BAD)))
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    path = _write(tmp_path / "m.jsonl", _entry(), line)
    with pytest.raises(DataError, match=message) as caught:
        _load(path)
    assert str(caught.value).startswith(f"{path}:2: ") and len(str(caught.value)) < 400


def test_all_bad_lines_at_once(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.jsonl", *["{"] * 15, _entry(), *["{}"] * 15)
    with pytest.raises(DataError) as caught:
        _load(path)
    lines = str(caught.value).splitlines()
    assert "30 problems" in lines[0] and lines[1].startswith(f"  {path}:1: ") and lines[-1] == "  and 10 more"
    assert len(lines) == 22 and f"{path}:17" in str(caught.value) and f"{path}:16" not in str(caught.value)


def test_a_line_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"audio_filepath": "\xff.wav", "duration": 1}\n')
    with pytest.raises(DataError, match="UTF-8"):
        _load(tmp_path / "m.jsonl")


@given(st.lists(st.binary(max_size=60) | st.sampled_from([line.encode() for line, _ in BAD]), max_size=6))
def test_fuzz(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError):
        load_manifest(path, workers=0)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@given(_json, _json, _json)
def test_types_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, name: Any, dur: Any, off: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "types.jsonl"
    path.write_text(json.dumps({"audio_filepath": name, "duration": dur, "offset": off}))
    try:
        manifest = load_manifest(path, check_files=False, workers=0)
    except DataError:
        return
    assert isinstance(name, str) and float(dur) == manifest.duration[0] > 0
    assert manifest.offset[0] == (0 if off is None else float(off)) >= 0


def test_durations_are_read_from_headers(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.ones(24000, np.int16))
    path = _write(tmp_path / "m.jsonl", {"audio_filepath": "a.wav"}, _entry(duration=None, offset=0.5))
    assert load_manifest(path).duration.tolist() == [1.5, 1.0]
    _write(path, {"audio_filepath": "a.wav", "offset": 2})
    with pytest.raises(DataError, match=r"m\.jsonl:1: offset is beyond 1.500 s"):
        load_manifest(path)
    write_wav(tmp_path / "a.wav", np.ones((100, 2), np.int16))
    _write(path, {"audio_filepath": "a.wav"})
    with pytest.raises(DataError, match="2 channels"):
        load_manifest(path)
    assert len(load_manifest(path, channel="mix")) == 1


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.jsonl", _entry("a.wav"), _entry("b.wav"))
    with pytest.raises(DataError, match="2 problems") as caught:
        load_manifest(path)
    assert f"{path}:2: no such file: b.wav; looked for {tmp_path / 'b.wav'}" in str(caught.value)
    with pytest.raises(DataError, match="No such file"):
        load_manifest(tmp_path / "none.jsonl")


def test_a_path_relative_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wav(tmp_path / "a.wav", np.ones(16000, np.int16))
    path = _write(tmp_path / "sub" / "m.jsonl", _entry("a.wav", duration=1.0))
    monkeypatch.chdir(tmp_path)
    assert load_manifest(path).source(0) == str(tmp_path / "a.wav")


def test_the_jail(tmp_path: Path) -> None:
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
        write_wav(tmp_path / folder / "a.wav", np.ones(16000, np.int16))
    (tmp_path / "in" / "link.wav").symlink_to(tmp_path / "out" / "a.wav")
    for name in ("../out/a.wav", str(tmp_path / "out" / "a.wav"), "link.wav"):
        path = _write(tmp_path / "in" / "m.jsonl", _entry(name))
        assert len(load_manifest(path)) == 1
        with pytest.raises(DataError, match=r"outside of data\.root"):
            load_manifest(path, root=tmp_path / "in")
    assert len(load_manifest(_write(path, _entry("a.wav")), root=tmp_path / "in")) == 1


def test_everything_dropped_says_why(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "m.jsonl", _entry(duration=0.5), _entry("b.wav", duration=90), _entry("c.wav", duration=99)
    )
    with pytest.raises(DataError, match=r"all 3 .* 1 shorter than min_duration=1.0 s, 2 longer than max_duration=60"):
        _load(path, min_duration=1.0, max_duration=60.0)
    kept = _load(path, min_duration=0.5, max_duration=90.0)  # both ends belong to it
    assert len(kept) == 2 and kept.dropped == (("longer than max_duration=90.0 s", 1),)
    with pytest.raises(DataError, match="empty"):
        _load(_write(path))


def test_duplicates(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.jsonl", _entry(), _entry("./b.wav"), _entry(), _entry("x/../b.wav"), _entry(offset=1.0))
    with pytest.raises(DataError, match="2 problems") as caught:
        _load(path)
    assert f"{path}:3: a.wav@0.000+2.000 stands already in {path}:1" in str(caught.value)
    assert f"{path}:4: b.wav" in str(caught.value)


def test_ids_do_not_depend_on_where_the_data_is(tmp_path: Path) -> None:
    for base in (tmp_path / "here", tmp_path / "there" / "deep"):
        for part in ("x", "y"):
            (base / part).mkdir(parents=True)
            write_wav(base / part / "a.wav", np.ones(32000, np.int16))
        _write(base / "x" / "m.jsonl", _entry("a.wav"))
        _write(base / "y" / "m.jsonl", _entry(str(base / "y" / "a.wav")))
    loaded = [load_manifest([b / "x/m.jsonl", b / "y/m.jsonl"]) for b in (tmp_path / "here", tmp_path / "there/deep")]
    assert loaded[0].digest == loaded[1].digest
    assert [loaded[1].identity(i) for i in range(2)] == ["x/a.wav@0.000+2.000", "y/a.wav@0.000+2.000"]
    shutil.rmtree(tmp_path / "here")


@pytest.mark.parametrize("change", [{"duration": 2.25}, {"offset": 0.25}, {"audio_filepath": "z.wav"}])
def test_the_digest_sees_changes(tmp_path: Path, change: dict[str, Any]) -> None:
    first = _load(_write(tmp_path / "m.jsonl", _entry(), _entry("b.wav"))).digest
    assert first == _load(_write(tmp_path / "n.jsonl", "", _entry(text="new"), _entry("b.wav"))).digest
    assert first != _load(_write(tmp_path / "m.jsonl", _entry(), _entry("b.wav") | change)).digest
    assert first != _load(_write(tmp_path / "m.jsonl", _entry("b.wav"), _entry())).digest


def test_lists_of_files(tmp_path: Path) -> None:
    odd = _write(tmp_path / "a,b.jsonl", _entry())
    assert manifest_files(str(odd)) == [str(odd)]
    assert manifest_files("x.jsonl, y.jsonl,") == ["x.jsonl", "y.jsonl"]
    assert manifest_files(["x.jsonl", Path("y.jsonl")]) == ["x.jsonl", "y.jsonl"]
    assert manifest_files("~/x.jsonl") == [os.path.expanduser("~/x.jsonl")]
    with pytest.raises(DataError, match="no file is named"):
        manifest_files("")


def test_a_manifest_that_changed_under_us(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.jsonl", _entry(), _entry("b.wav"))
    manifest = _load(path)
    path.write_text("")
    with pytest.raises(DataError, match="changed"):
        manifest.fields(1)


def test_written_manifests_read_back(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", [_entry("ä.wav"), _entry("b.wav", speaker="s")])
    manifest = _load(tmp_path / "m.jsonl")
    assert list(manifest.names) == ["ä.wav", "b.wav"] and manifest.fields(1)["speaker"] == "s"
    assert os.listdir(tmp_path) == ["m.jsonl"]
    assert not math.isnan(manifest.duration.sum())
