"""The bound of the folder of copies: what goes, what stays, and readers that share it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nest_fn import Config
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files import remote_cache
from nest_fn.train.data.audio_files.remote import cache_of, held_copy, hold_copy, remote
from nest_fn.train.data.audio_files.remote_cache import Cache, copy_path
from nest_fn.train.data.audio_files.wav import wav_bytes
from nest_fn.train.data.corpus.shard_index import index_shards
from tests.train.data.test_remote import SAMPLES

fsspec = pytest.importorskip("fsspec", reason="fsspec, of the extra remote, is absent")
ROOT = Path(__file__).resolve().parents[3]
SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


@pytest.fixture
def memory() -> Iterator[Any]:
    """Ten files of 1000 bytes."""
    system = fsspec.filesystem("memory")
    for number in range(10):
        system.pipe_file(f"/many/{number}", content(number))
    yield system
    system.rm("/many", recursive=True)


def use(cache: Cache, *numbers: int) -> None:
    """Read files in this order; each use is a second later than the one before."""
    for number in numbers:
        source = remote(f"memory://many/{number}", cache)
        with held_copy(source) as path:
            assert Path(path).read_bytes() == content(number)
        facts = [os.stat(one).st_mtime_ns for one in cache.folder.glob("??/*")]
        os.utime(path, ns=(max(facts) + 10**9, max(facts) + 10**9))


def there(cache: Cache) -> list[int]:
    return [number for number in range(10) if copy_path(cache, f"memory://many/{number}").exists()]


def test_those_used_longest_ago_go(memory: Any, tmp_path: Path) -> None:
    """Down to nine tenths of the bound, and never above it; a use is not only the first."""
    cache = Cache(tmp_path / "cache", 4 * SIZE + 500)
    use(cache, 0, 1, 2, 3)
    assert there(cache) == [0, 1, 2, 3]
    use(cache, 0, 4)
    assert there(cache) == [0, 2, 3, 4] or there(cache) == [0, 3, 4]
    for number in range(10):
        use(cache, number)
        assert sum(path.stat().st_size for path in cache.folder.glob("??/*")) <= 4 * SIZE + 500
        assert number in there(cache)


def test_what_is_not_a_copy_stays(memory: Any, tmp_path: Path) -> None:
    """Whatever its name and age: beside the copies, among them, by a link, in a folder that is a link."""
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    use(cache, 0, 1, 2)
    inner = copy_path(cache, "memory://many/2").parent
    linked = "f" * 32 + "_a.wav"
    mine = [cache.folder / "thesis.tex", inner / "thesis.tex", inner / f"{'0' * 31}_a", cache.folder / "ab.tar",
            tmp_path / "elsewhere" / linked, inner / f".{'a' * 32}_x"]  # fmt: skip
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(9) * 5)
        os.utime(path, (0, 0))
    (cache.folder / "ff").exists() or (cache.folder / "ff").symlink_to(tmp_path / "elsewhere")
    (inner / (inner.name + "0" * 30 + "_link")).symlink_to(tmp_path / "elsewhere" / linked)
    use(cache, *range(10), *range(10))
    assert all(path.read_bytes() == content(9) * 5 for path in mine) and len(there(cache)) <= 2
    assert (inner / (inner.name + "0" * 30 + "_link")).is_symlink()


def test_a_copy_that_somebody_holds_stays(memory: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    path, file = hold_copy(remote("memory://many/0", cache))
    use(cache, *range(1, 10))
    assert Path(path).read_bytes() == content(0) and 0 in there(cache)
    file.close()
    use(cache, *range(1, 10))
    assert 0 not in there(cache)
    use(cache._replace(limit=None), *range(10))
    assert there(cache) == list(range(10))  # without a bound


def test_a_shard_stays_while_its_index_lives(memory: Any, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav_bytes(SAMPLES))
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav"}\n')
    assert main(["data", "shard", str(tmp_path / "m.jsonl"), "--shards", "1", "--out", str(tmp_path / "tar")]) == 0
    memory.pipe_file("/many/audio.tar", (tmp_path / "tar" / "audio_0.tar").read_bytes())
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    index = index_shards(["memory://many/audio.tar"], cache=cache)
    use(cache, *range(10))
    assert Path(index.span(0).path).exists()
    del index
    use(cache, 0, 1)
    assert not copy_path(cache, "memory://many/audio.tar").exists()


def test_without_locks_nothing_is_removed(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Any, kind: int) -> None:
        raise OSError(remote_cache._NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    use(cache, *range(10))
    assert there(cache) == list(range(10))


def test_what_a_killed_process_left_goes_when_the_file_is_fetched_again(memory: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", None)
    path = copy_path(cache, "memory://many/0")
    path.parent.mkdir(parents=True)
    for name in (f".{path.name}.4321.tmp", f".{path.name}.lock"):
        (path.parent / name).write_bytes(b"half")
    use(cache, 0)
    assert list(path.parent.iterdir()) == [path]


def test_the_setting(tmp_path: Path) -> None:
    data = Config.preset("tiny", [f"data.remote_cache={tmp_path}", "data.remote_cache_mb=1.5"]).data
    assert cache_of(data) == Cache(tmp_path, 1_500_000)
    assert cache_of(Config.preset("tiny", ["data.remote_cache_mb=null"]).data).limit is None


READER = """
import sys
from pathlib import Path
from nest_fn.train.data.audio_files.remote import held_copy, remote
from nest_fn.train.data.audio_files.remote_cache import Cache
from concurrent.futures import ThreadPoolExecutor
address, folder, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
def read(number):
    number = (number * 7 + first) % 20
    with held_copy(remote(f"{address}/{number}", Cache(folder, 3500))) as path:
        assert Path(path).read_bytes() == bytes([number]) * 1000, number
with ThreadPoolExecutor(4) as pool:
    list(pool.map(read, range(60)))
assert "torch" not in sys.modules
"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


def test_processes_that_share_a_small_cache(tmp_path: Path) -> None:
    """Two processes of four threads each, 20 files, and room for three: every reader gets what it asked for.

    Eight readers may hold more than there is room for; with the first fetch after them, that is over.
    """
    pytest.importorskip("aiohttp", reason="aiohttp, of the extra remote, is absent")
    (tmp_path / "served").mkdir()
    for number in range(21):
        (tmp_path / "served" / str(number)).write_bytes(content(number))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, folder = f"http://127.0.0.1:{server.server_port}", str(tmp_path / "cache")
        words = [[sys.executable, "-c", READER, address, folder, str(first)] for first in (0, 3)]
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(partial(subprocess.run, cwd=ROOT, capture_output=True, text=True), words))
        with held_copy(remote(f"{address}/20", Cache(tmp_path / "cache", 3500))) as path:
            assert Path(path).read_bytes() == content(20)
        server.shutdown()
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    copies = [path for path in left if path.parent.parent == tmp_path / "cache"]
    assert copies and sum(path.stat().st_size for path in copies) <= 3500
    assert {path.name for path in left} - {path.name for path in copies} <= {".nest_fn_bytes"}
    names = {hashlib.sha256(f"{address}/{number}".encode()).hexdigest()[:32] for number in range(21)}
    assert {path.name.partition("_")[0] for path in copies} <= names
