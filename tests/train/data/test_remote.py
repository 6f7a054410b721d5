"""Audio, manifests and shards at an address: fsspec's memory, and an HTTP server that fails now and then."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nest_fn import Config, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files import remote as remote_files
from nest_fn.train.data.audio_files.audio import read_audio
from nest_fn.train.data.audio_files.remote import held_copy, hold_copy, remote, remote_bytes
from nest_fn.train.data.audio_files.wav import wav_bytes, write_wav
from nest_fn.train.data.corpus.manifest import load_manifest
from nest_fn.train.errors import DataError, UsageError

fsspec = pytest.importorskip("fsspec", reason="fsspec, of the extra remote, is absent")
SAMPLES = (3000 * np.sin(np.arange(16000) / 20)).astype(np.int16)
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory with two files, and a manifest beside them."""
    system = fsspec.filesystem("memory")
    for name in ("a", "b"):
        system.pipe_file(f"/corpus/{name}.wav", wav_bytes(SAMPLES))
    lines = [{"audio_filepath": "a.wav", "duration": 1.0}, {"audio_filepath": "memory://corpus/b.wav"}]
    system.pipe_file("/corpus/m.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    yield system
    system.rm("/corpus", recursive=True)


def test_a_manifest_at_an_address(memory: Any, tmp_path: Path) -> None:
    manifest = load_manifest("memory://corpus/m.jsonl", cache=tmp_path / "cache")
    assert manifest.duration.tolist() == [1.0, 1.0] and manifest.where(1) == "memory://corpus/m.jsonl:2"
    assert [str(manifest.source(index)) for index in (0, 1)] == ["memory://corpus/a.wav", "memory://corpus/b.wav"]
    assert manifest.read_bytes(0) == wav_bytes(SAMPLES) and manifest.fields(0)["duration"] == 1.0
    for name in ("a", "m"):
        (tmp_path / f"{name}.{'wav' if name == 'a' else 'jsonl'}").write_bytes(
            memory.cat_file(f"/corpus/{name}.{'wav' if name == 'a' else 'jsonl'}")
        )
    here = load_manifest(tmp_path / "m.jsonl", cache=tmp_path / "cache")
    assert here.digest == manifest.digest  # the corpus moved
    memory.pipe_file("/corpus/m.jsonl", gzip.compress(memory.cat_file("/corpus/m.jsonl")))
    assert load_manifest("memory://corpus/m.jsonl", cache=tmp_path / "cache").digest == manifest.digest
    memory.pipe_file("/corpus/b.wav", b"changed")  # a copy is kept
    np.testing.assert_array_equal(read_audio(manifest.source(1)), SAMPLES)
    with pytest.raises(DataError, match=r"memory://corpus/m.jsonl:1.*outside of data.root"):
        load_manifest("memory://corpus/m.jsonl", root=tmp_path, cache=tmp_path / "cache")


def test_commands_read_addresses(memory: Any, tmp_path: Path, capsys: Captured) -> None:
    cfg = Config.preset("tiny", ["encoder.n_layers=1"])
    checkpoint.save(tmp_path / "model", *init(key(0), cfg), cfg)
    cache = f"data.remote_cache={tmp_path / 'cache'}"
    words = ["extract", str(tmp_path / "model"), "memory://corpus/m.jsonl", "--out", str(tmp_path / "out"), cache]
    assert main(words) == 0
    index = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [line["audio_filepath"] for line in index] == ["memory://corpus/a.wav", "memory://corpus/b.wav"]
    run = ["pretrain", "-c", "tiny", "data.train=memory://corpus/m.jsonl", "trainer.max_steps=1", "encoder.n_layers=1"]
    assert main([*run, cache, "--folder", str(tmp_path / "run")]) == 0
    assert main([*words[:2], "memory://corpus/a.wav", "--out", str(tmp_path / "one"), cache]) == 0
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "memory://corpus/none.wav", "duration": 1.0}\n')
    capsys.readouterr()
    assert main([*words[:2], str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "none"), cache]) == 3
    assert "m.jsonl:1: memory://corpus/none.wav" in capsys.readouterr().err


def test_shards_at_an_address_and_in_commands(memory: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_wav(tmp_path / f"{name}.wav", SAMPLES)
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"}\n')
    assert main(["data", "shard", str(tmp_path / "m.jsonl"), "--shards", "2", "--out", str(tmp_path / "tar")]) == 0
    for number in (0, 1):
        memory.pipe_file(f"/corpus/audio_{number}.tar", (tmp_path / "tar" / f"audio_{number}.tar").read_bytes())
    cfg = Config.preset("tiny", ["encoder.n_layers=1"])
    checkpoint.save(tmp_path / "model", *init(key(0), cfg), cfg)
    features, archives = {}, str(tmp_path / "tar" / "audio_{0..1}.tar")
    for place in ("memory://corpus", str(tmp_path / "tar")):
        out = tmp_path / f"out{len(features)}"
        words = [str(tmp_path / "model"), str(tmp_path / "tar" / "manifest.jsonl"), "--out", str(out)]
        shards = f'data.valid_shards="{place}/audio_{{0..1}}.tar"'
        assert main(["extract", *words, shards, f"data.remote_cache={tmp_path / 'cache'}"]) == 0
        features[place] = [np.load(path) for path in sorted(out.glob("*.npy"))]
        assert main(["data", "validate", str(out / "index.jsonl"), "--tar", archives]) == 0
    first, second = features.values()
    np.testing.assert_array_equal(first, second)
    one = tmp_path / "one"
    again = ["data", "shard", str(tmp_path / "tar" / "manifest.jsonl"), "--tar", archives, "--shards", "1"]
    assert main([*again, "--out", str(one)]) == 0
    assert main(["data", "validate", str(one / "manifest.jsonl"), "--tar", str(one / "audio_0.tar")]) == 0


class Faulty(SimpleHTTPRequestHandler):
    """Serves a folder; the first two requests for a name fail, and one file always does."""

    asked: dict[str, int] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        count = self.asked[self.path] = self.asked.get(self.path, 0) + 1
        if "always" in self.path or count <= 2:
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="aiohttp, of the extra remote, is absent")
    (tmp_path / "served").mkdir()
    write_wav(tmp_path / "served" / "a.wav", SAMPLES)
    (tmp_path / "served" / "always.wav").touch()
    Faulty.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Faulty, directory=str(tmp_path / "served"))) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_an_http_server_that_fails_now_and_then(server: str, tmp_path: Path) -> None:
    waits: list[float] = []
    with held_copy(remote(f"{server}/a.wav", tmp_path / "cache"), waits.append) as path:
        assert Path(path).read_bytes() == wav_bytes(SAMPLES) and 1 <= len(waits) <= 3
    with held_copy(remote(f"{server}/a.wav", tmp_path / "cache"), waits.append) as again:
        assert again == path
    assert remote_bytes(f"{server}/a.wav") == wav_bytes(SAMPLES)
    with pytest.raises(DataError, match=r"always.wav: not fetched in 4 attempts"):
        hold_copy(remote(f"{server}/always.wav", tmp_path / "cache"), waits.append)
    with pytest.raises(DataError, match="none.wav: FileNotFoundError"):
        hold_copy(remote(f"{server}/none.wav", tmp_path / "cache"), waits.append)
    assert len([found for found in (tmp_path / "cache").rglob("*") if found.is_file()]) == 1


def test_an_unknown_scheme_and_a_cut_answer(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nonsense://a.wav: fsspec does not read it here"):
        hold_copy(remote("nonsense://a.wav", tmp_path))
    monkeypatch.setattr(remote_files, "_check_size", _cut)
    with pytest.raises(DataError, match="4 attempts .OSError: 3 of 5 bytes came"):
        hold_copy(remote("memory://corpus/a.wav", tmp_path), lambda seconds: None)
    assert not [found for found in tmp_path.rglob("*") if found.is_file()]


def _cut(*arguments: object) -> None:
    raise OSError("3 of 5 bytes came")
