"""What is no plain file, given as input: one line that says so, at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nest_fn import Config, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.train.cli.main import main
from nest_fn.train.data.corpus.manifest import write_manifest
from tests import unprivileged
from tests.train.conftest import Corpus
from tests.train.faults import Captured

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("pipe", "socket", "zero", "folder", "loop", "missing", "empty", "binary", "utf16", "huge")
WORDS = {"pipe": "a pipe", "socket": "a socket", "zero": "a device", "loop": "symbolic links", "missing": "o such file"}


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    """A file of each kind, all named as audio files are."""
    folder = tmp_path / "odd"
    folder.mkdir()
    os.mkfifo(folder / "pipe.wav")
    (folder / "zero.wav").symlink_to("/dev/zero")
    (folder / "folder.wav").mkdir()
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    (folder / "empty.wav").touch()
    (folder / "binary.wav").write_bytes(bytes(range(256)) * 8)
    (folder / "utf16.wav").write_text('{"audio_filepath": "a.wav"}', encoding="utf-16")
    (folder / "huge.wav").write_bytes(b'{"audio_filepath": "' + b"a" * 5_000_000 + b'"}\n')
    here = os.getcwd()
    os.chdir(folder)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket.wav")
        os.chdir(here)
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = Config.preset("tiny", ["encoder.n_layers=1"])
    path = tmp_path_factory.mktemp("model") / "model.pt"
    checkpoint.save_file(path, *init(key(0), cfg), cfg)
    return path


def told(capsys: Captured) -> str:
    """The one line of the error, or its first line and what it lists."""
    text = capsys.readouterr().err
    first, *listed = text.splitlines()
    assert first.startswith("error: ") and max(map(len, text.splitlines())) < 1000, text[:2000]
    assert all(line.startswith("  ") for line in listed) and len(listed) <= 21
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest(odd: Path, kind: str, capsys: Captured) -> None:
    assert main(["data", "validate", str(odd / f"{kind}.wav")]) == 3
    assert WORDS.get(kind, "") in told(capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config(odd: Path, kind: str, capsys: Captured) -> None:
    assert main(["config", "show", str(odd / f"{kind}.wav")]) == 2
    assert WORDS.get(kind, "") in told(capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint(odd: Path, kind: str, capsys: Captured) -> None:
    assert main(["convert", str(odd / f"{kind}.wav"), str(odd / "new")]) == 4
    assert WORDS.get(kind, "") in told(capsys) and not (odd / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_audio(odd: Path, model: Path, kind: str, capsys: Captured, tmp_path: Path) -> None:
    assert main(["extract", str(model), str(odd / f"{kind}.wav"), "--out", str(tmp_path / "out")]) == 3
    assert kind == "folder" or WORDS.get(kind, "") in told(capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens(odd: Path, model: Path, kind: str, capsys: Captured, tmp_path: Path, corpus: Corpus) -> None:
    lines = [json.loads(line) | {"text": "a b"} for line in Path(corpus.train).read_text().splitlines()]
    place = Path(corpus.train).parent
    write_manifest(
        tmp_path / "text.jsonl", [line | {"audio_filepath": str(place / line["audio_filepath"])} for line in lines]
    )
    argv = ["finetune-ctc", str(model), "--out", str(tmp_path / "out"), "--tokens", str(odd / f"{kind}.wav")]
    code = main([*argv, f"data.train={tmp_path / 'text.jsonl'}", f"data.valid={tmp_path / 'text.jsonl'}"])
    assert code == (3 if kind == "huge" else 2)  # one token, huge, is a list of tokens: no text is made of it
    assert kind == "huge" or (WORDS.get(kind, "") in told(capsys) and not (tmp_path / "out").exists())


@pytest.mark.parametrize("kind", KINDS)
def test_audio_of_a_manifest_and_shards(odd: Path, kind: str, capsys: Captured) -> None:
    write_manifest(odd / "m.jsonl", [{"audio_filepath": f"{kind}.wav"}])
    assert main(["data", "validate", str(odd / "m.jsonl")]) == 3
    told(capsys)
    assert main(["data", "validate", str(odd / "m.jsonl"), "--tar", str(odd / f"{kind}.wav")]) == 3
    assert WORDS.get(kind, "") in told(capsys)


def test_a_scan_names_each(odd: Path, capsys: Captured) -> None:
    """No file of these is read; the command ends."""
    assert main(["data", "scan", str(odd), str(odd / "m.jsonl")]) == 3
    assert "holds no readable audio" in told(capsys)


def test_what_must_not_be_read(odd: Path, tmp_path: Path) -> None:
    """As a user without the right to: each is named, with the reason."""
    for name in ("m.jsonl", "c.yaml", "c.pt", "closed.wav"):
        (tmp_path / name).write_text("{}")
        (tmp_path / name).chmod(0)
    (tmp_path / "a.jsonl").write_text('{"audio_filepath": "closed.wav", "duration": 1.0}\n')
    (tmp_path / "shut").mkdir(mode=0)
    lines = ["data validate m.jsonl", "config show c.yaml", "convert c.pt new", "data validate a.jsonl",
             "data validate shut/m.jsonl", "config show shut/c.yaml"]  # fmt: skip
    script = "import sys; from nest_fn.train.cli.main import main; print([main(w.split()) for w in sys.argv[1:]])"
    command = [*unprivileged.command_prefix(), sys.executable, "-c", script, *lines]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if done.returncode == unprivileged.REFUSED:
        pytest.skip("root may not give up its capabilities here, and so reads everything")
    assert done.stdout.splitlines()[-1] == "[3, 2, 4, 3, 3, 2]"
    assert (done.stdout + done.stderr).count("Permission denied") == len(lines) and "Traceback" not in done.stderr
