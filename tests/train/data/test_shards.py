"""Tar shards against the standard library's ``tarfile``, and archives that mean harm (faults B5, B6)."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.errors import OutputError
from nest_fn.train.data.audio_files.audio import read_audio
from nest_fn.train.data.audio_files.wav import Span, write_wav
from nest_fn.train.data.corpus.manifest import load_manifest, write_manifest
from nest_fn.train.data.corpus.shard_index import even_cuts, expand_pattern, index_shards, write_shards
from nest_fn.train.data.corpus.tar import tar_members
from nest_fn.train.errors import DataError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real recordings of ../shared/data are absent")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_where_tarfile_finds_them(tmp_path: Path, kind: str) -> None:
    members = {"a.wav": b"", "d/b.flac": b"x" * 511, "./c.wav": b"y" * 513, "k" * 90 + "/" + "n" * 90: b"z" * 2000}
    if kind != "ustar":
        members |= {"ä" * 120 + ".wav": b"long"}
    path = _tar(tmp_path / "a.tar", members, FORMATS[kind])
    data = path.read_bytes()
    found = tar_members(str(path))
    with tarfile.open(path) as archive:
        assert [(m.start, m.size) for m in found] == [(m.offset_data, m.size) for m in archive.getmembers()]
    assert {m.name: data[m.start : m.start + m.size] for m in found} == {
        name.removeprefix("./"): content for name, content in members.items()
    }


def test_folders_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("./a.wav"))
    assert [member.name for member in tar_members(str(tmp_path / "a.tar"))] == ["a.wav"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a.wav")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match="only plain files are read"):
        tar_members(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.wav", "a/../../b.wav", "a/..", "\\x\\a.wav"])
@pytest.mark.parametrize("kind", FORMATS)
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(DataError, match="outside of the archive"):
        tar_members(str(_tar(tmp_path / "a.tar", {name: b"x"}, FORMATS[kind])))


def test_duplicates_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.wav"))
        archive.addfile(tarfile.TarInfo("./a.wav"))
    with pytest.raises(DataError, match="comes twice"):
        tar_members(str(tmp_path / "a.tar"))


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = _tar(tmp_path / "a.tar", {"a.wav": b"x" * 700, "b.wav": b"y" * 600}).read_bytes()
    end = 2 * (512 + 1024)  # of the last member; the zeros after it are the end mark
    for size in [*range(0, end + 512, 64), 513, end + 511]:
        (tmp_path / "b.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match="cut|end mark"):
            tar_members(str(tmp_path / "b.tar"))
    (tmp_path / "b.tar").write_bytes(whole[: end + 512])
    assert len(tar_members(str(tmp_path / "b.tar"))) == 2


@settings(max_examples=300)
@given(st.data())
def test_mutated_archives_give_a_data_error_or_members(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    raw = bytearray(_tar(path, {"a.wav": b"x" * 20, "ä" * 150: b"y" * 600}, tarfile.PAX_FORMAT).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        block = data.draw(st.integers(0, 5)) * 512
        place = block + data.draw(st.integers(0, 511))
        raw[place] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # a checksum that fits, so that the fields themselves are reached
            raw[block + 148 : block + 156] = b" " * 8
            raw[block + 148 : block + 156] = b"%06o\0 " % sum(raw[block : block + 512])
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        members = tar_members(str(path))
    except DataError:
        return
    assert all(m.start + m.size <= path.stat().st_size and ".." not in m.name.split("/") for m in members)


def test_patterns() -> None:
    assert expand_pattern("a_{0..2}.tar") == ["a_0.tar", "a_1.tar", "a_2.tar"]
    assert expand_pattern("a__OP_08..10_CL_.tar") == ["a_08.tar", "a_09.tar", "a_10.tar"]
    assert expand_pattern("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    assert expand_pattern("plain.tar") == ["plain.tar"]
    for bad in ("{5..2}", "{0..99999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(DataError, match="range|names"):
            expand_pattern(bad)


def _corpus(folder: Path, count: int = 7) -> Path:
    entries = []
    for number in range(count):
        (folder / f"d{number % 2}").mkdir(parents=True, exist_ok=True)
        name = f"d{number % 2}/{number}.wav"
        write_wav(folder / name, np.full(16000 + number, number + 1, np.int16))
        entries.append({"audio_filepath": name, "duration": 1 + number / 16000, "speaker": f"s{number}"})
    entries.append({"audio_filepath": "d0/0.wav", "duration": 0.25, "offset": 0.5})
    write_manifest(folder / "m.jsonl", entries)
    return folder / "m.jsonl"


def test_shards_give_the_same_audio_and_the_same_ids(tmp_path: Path) -> None:
    plain = load_manifest(_corpus(tmp_path / "plain"))
    written = write_shards(plain, tmp_path / "tar", 3)
    packed = load_manifest(written, shards=[str(tmp_path / "tar" / "audio_{0..2}.tar")])
    where = {packed.identity(i): i for i in range(len(packed))}
    assert set(where) == {plain.identity(i) for i in range(len(plain))} and len(where) == 8
    for index in range(len(plain)):
        twin = where[plain.identity(index)]
        assert isinstance(packed.source(twin), Span)
        parts = [
            read_audio(m.source(i), float(m.offset[i]), float(m.duration[i]))
            for m, i in ((plain, index), (packed, twin))
        ]
        assert np.array_equal(*parts)
        assert packed.fields(twin).get("speaker") == plain.fields(index).get("speaker")
        assert packed.utterance[twin] == plain.utterance[index]


def test_shards_depend_on_content_alone_and_overwrite_nothing(tmp_path: Path) -> None:
    manifest = load_manifest(_corpus(tmp_path / "plain"))
    write_shards(manifest, tmp_path / "a", 2)
    write_shards(manifest, tmp_path / "b", 2)
    for name in ("audio_0.tar", "audio_1.tar", "manifest.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert write_shards(manifest, tmp_path / "a", 2) == tmp_path / "a" / "manifest.jsonl"
    with pytest.raises(OutputError, match="shards was 2, is 3"):
        write_shards(manifest, tmp_path / "a", 3)
    for count in (0, 8):
        with pytest.raises(DataError, match="7 audio files"):
            write_shards(manifest, tmp_path / "c", count)


def test_shards_are_even_in_bytes(tmp_path: Path) -> None:
    seconds = [20, *[1] * 20, 5, 5, 5, 5]  # of 60 s, the first third in one file
    for number, length in enumerate(seconds):
        write_wav(tmp_path / f"{number:02d}.wav", np.full(16000 * length, number + 1, np.int16))
    lines = [{"audio_filepath": f"{number:02d}.wav", "duration": length} for number, length in enumerate(seconds)]
    write_manifest(tmp_path / "m.jsonl", lines)
    written = write_shards(load_manifest(tmp_path / "m.jsonl"), tmp_path / "t", 3)
    entries = [json.loads(line) for line in written.read_text().splitlines()]
    assert [(e["audio_filepath"], e["shard_id"]) for e in entries] == [
        (line["audio_filepath"], 0 if number < 1 else 1 if number < 21 else 2) for number, line in enumerate(lines)
    ]
    archives = [(tmp_path / "t" / f"audio_{number}.tar").stat().st_size for number in range(3)]
    assert max(archives) - min(archives) < 32000  # a second


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.data())
def test_cuts_are_as_even_as_the_things_allow(sizes: list[int], draw: st.DataObject) -> None:
    parts = draw.draw(st.integers(1, len(sizes)))
    cuts = even_cuts(sizes, parts)
    assert cuts[0] == 0 and cuts[-1] == len(sizes) and len(cuts) == parts + 1
    assert all(first < last for first, last in pairwise(cuts))
    share = sum(sizes) / parts
    if max(sizes) <= share:
        assert all(abs(sum(sizes[first:last]) - share) <= max(sizes) for first, last in pairwise(cuts))


@needs_data
def test_real_flac_in_shards(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="the optional package soundfile reads FLAC")
    plain = load_manifest(DATA / "noise.jsonl")
    packed = load_manifest(write_shards(plain, tmp_path / "t", 2), shards=[str(tmp_path / "t" / "audio_{0..1}.tar")])
    assert packed.digest == plain.digest
    for index in (0, 47):
        assert np.array_equal(read_audio(packed.source(index), 1.0, 2.0), read_audio(plain.source(index), 1.0, 2.0))


def test_one_manifest_a_shard_and_missing_members(tmp_path: Path) -> None:
    for number in range(2):
        _tar(tmp_path / f"audio_{number}.tar", {f"{number}.wav": b"x", "both.wav": b"y"})
        lines = [{"audio_filepath": f"{number}-sub3.wav", "duration": 1}]
        write_manifest(tmp_path / f"m_{number}.jsonl", lines)
    shards = [str(tmp_path / "audio__OP_0..1_CL_.tar")]
    manifest = load_manifest([tmp_path / "m_0.jsonl", tmp_path / "m_1.jsonl"], shards=shards)
    assert [str(manifest.source(i)) for i in range(2)] == [f"{tmp_path}/audio_{n}.tar[{n}.wav]" for n in range(2)]
    for entry, message in [
        ({"audio_filepath": "2.wav"}, "not in any of 2 shards"),
        ({"audio_filepath": "0.wav", "shard_id": 1}, "not in shard"),
        ({"audio_filepath": "0.wav", "shard_id": 2}, "there are 2 shards"),
        ({"audio_filepath": "both.wav"}, "give its shard_id"),
    ]:
        write_manifest(tmp_path / "m.jsonl", [entry | {"duration": 1}], overwrite=True)
        with pytest.raises(DataError, match=message) as caught:
            load_manifest(tmp_path / "m.jsonl", shards=shards)
        assert "m.jsonl:1: " in str(caught.value)
    write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "both.wav", "duration": 1, "shard_id": 1}], overwrite=True)
    assert "audio_1" in str(load_manifest(tmp_path / "m.jsonl", shards=shards).source(0))
    with pytest.raises(DataError, match="No such file"):
        index_shards([str(tmp_path / "audio_{0..2}.tar")])


def test_members_outside_of_the_manifests_folder_get_safe_names(tmp_path: Path) -> None:
    source = _corpus(tmp_path / "plain")
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for line in lines:
        line["audio_filepath"] = f"../plain/{line['audio_filepath']}"
    (tmp_path / "other").mkdir()
    write_manifest(tmp_path / "other" / "m.jsonl", lines)
    written = write_shards(load_manifest(tmp_path / "other" / "m.jsonl"), tmp_path / "t", 1)
    packed = load_manifest(written, shards=[str(tmp_path / "t" / "audio_0.tar")])
    assert len(packed) == 8 and len(read_audio(packed.source(0))) == 16000
