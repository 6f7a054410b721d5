"""Cases from the field (docs/cases.md): each named test exists, and those cases that no other test tells."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
import soundfile

from nest_fn import Config, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.train.cli.main import main
from nest_fn.train.ctc.model_files import Recogniser, save_recogniser
from nest_fn.train.ctc.recogniser import Design, init_head
from nest_fn.train.ctc.scores import count_errors
from nest_fn.train.ctc.tokens import TokenList
from nest_fn.train.data.audio_files.wav import wav_bytes, write_wav

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[3]
NOISE = 0.1 * np.random.default_rng(0).standard_normal(16000)
M4A = b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0" + bytes(500)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, cfg = tmp_path_factory.mktemp("cases") / "model", Config.preset("tiny", ["encoder.n_layers=1"])
    checkpoint.save(folder, *init(key(0), cfg), cfg)
    return str(folder)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder of two files."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name in ("a.wav", "b.wav"):
        soundfile.write(folder / name, NOISE, 16000)
    return folder


def lines(path: Path, *entries: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def pretrain(folder: Path, manifest: str, *more: str) -> list[str]:
    settings = ["encoder.n_layers=1", "data.num_workers=0", "trainer.device=cpu", "trainer.threads=1"]
    return ["pretrain", "-c", "tiny", "--folder", str(folder), f"data.train={manifest}", *settings, *more]


def test_the_table_names_tests_that_exist() -> None:
    """Every case of the catalogue, and twelve of a later search, each with the test that holds it."""
    text = (ROOT / "docs" / "cases.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) >= 21 + 12 and all(re.search(r"`[\w/]+\.py::test_\w+`", row) for row in rows)
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", text)
    missing = [pair for pair in named if f"def {pair[1]}(" not in (ROOT / "tests" / pair[0]).read_text()]
    assert not missing


@pytest.mark.parametrize("words", [("--layers", "99"), ("--layers", "-9"), ("--weights", "1,2")])
def test_what_the_model_does_not_have(model: str, sounds: Path, words: tuple[str, str], capsys: Captured) -> None:
    """16: known only when the model is read."""
    assert main(["extract", model, str(sounds), "--out", str(sounds / "out"), "=".join(words)]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch("error: extract: .*(there is no layer|weights for 1 layers).*\n", told)
    assert not (sounds / "out").exists()


def test_fewer_steps_than_were_made(sounds: Path, tmp_path: Path, capsys: Captured) -> None:
    """32: and 34: responses and noise that no setting lets a run use."""
    manifest = lines(tmp_path / "m.jsonl", {"audio_filepath": "sounds/a.wav"})
    run = pretrain(tmp_path / "run", manifest)
    in_vain = [f"data.rir={manifest}", f"data.noise={manifest}", "data.augment.prob=0"]
    assert main([*run, *in_vain, "trainer.max_steps=2"]) == 0
    told = capsys.readouterr().err
    assert "data.rir is never used, for data.augment.rir_prob is 0" in told
    assert "data.noise is never used, for data.augment.prob is 0" in told
    assert main([*run, *in_vain, "trainer.max_steps=1"]) == 0
    assert "trainer.max_steps is 1, so that nothing is left to do" in capsys.readouterr().err


def test_formats_that_are_not_read_are_named(model: str, sounds: Path, tmp_path: Path, capsys: Captured) -> None:
    """Among others as alone, by every command, and with what they are."""
    contents = {
        "c.m4a": (M4A, "MPEG-4 audio or video"),
        "d.wav": (b"<!DOCTYPE html><html>404", "a web page"),
        "e.wav": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "f.webm": (b"\x1aE\xdf\xa3" + bytes(99), "Matroska or WebM"),
        "g.wav": (b"\x1f\x8b" + bytes(99), "compressed by gzip"),
    }
    for name, (content, _) in contents.items():
        (sounds / name).write_bytes(content)
    assert main(["data", "scan", str(sounds), str(tmp_path / "m.jsonl")]) == 3
    told = "".join(capsys.readouterr())
    assert "2 files in" in told and "5 left out" in told
    for name, (_, kind) in contents.items():
        assert re.search(rf"{name}: cannot be decoded: it is .*{kind}", told), name
        assert main(["extract", model, str(sounds / name), "--out", str(tmp_path / "out")]) == 3
        assert kind in capsys.readouterr().err
    assert main(["extract", model, str(sounds), "--out", str(tmp_path / "out")]) == 3
    assert "nest-fn data scan makes a manifest without such files" in capsys.readouterr().err
    assert main(["extract", model, str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out")]) == 0


def test_a_folder_as_people_have_it(model: str, sounds: Path, tmp_path: Path) -> None:
    """Endings in capitals, companions that macOS writes, MP3 and FLAC under the name of WAV."""
    shutil.move(sounds / "a.wav", sounds / "a.WAV")
    (sounds / "._a.WAV").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(99))
    soundfile.write(sounds / "c.wav", NOISE, 16000, format="MP3")
    soundfile.write(sounds / "d.wav", NOISE, 16000, format="FLAC")
    assert main(["data", "scan", str(sounds), str(tmp_path / "m.jsonl")]) == 0
    names = [json.loads(line)["audio_filepath"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert names == [f"sounds/{name}" for name in ("a.WAV", "b.wav", "c.wav", "d.wav")]
    assert main(["extract", model, str(sounds), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.npy"))) == 4
    assert main(["extract", model, str(sounds / "a.WAV"), "--out", str(tmp_path / "one")]) == 0


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"offset": -0.5}, "offset -0.5 is negative"),
        ({"audio_filepath": "sounds/stereo.wav"}, "2 channels, one wanted"),
        ({"audio_filepath": "sph2pipe -f wav x.sph |"}, "no such file: sph2pipe -f wav x.sph |"),
        ({"audio_filepath": "sounds/slow.wav"}, "no less than 1000 Hz is resampled"),
    ],
)
def test_lines_are_named_by_every_command(
    entry: dict[str, Any], told: str, model: str, sounds: Path, tmp_path: Path, capsys: Captured
) -> None:
    soundfile.write(sounds / "stereo.wav", NOISE.reshape(-1, 2), 16000)
    soundfile.write(sounds / "slow.wav", NOISE, 900)
    good = {"audio_filepath": "sounds/a.wav", "duration": 0.5}
    manifest = lines(tmp_path / "m.jsonl", good, good | entry)
    assert main(["data", "validate", manifest]) == 3
    assert re.search(rf"m\.jsonl:2: .*{re.escape(told)}", "".join(capsys.readouterr()))
    assert main(pretrain(tmp_path / "run", manifest, "trainer.max_steps=1")) == 3
    assert re.search(rf"m\.jsonl:2: .*{re.escape(told)}", capsys.readouterr().err)


def test_a_manifest_that_nobody_wrote_is_not_named(model: str, sounds: Path, tmp_path: Path, capsys: Captured) -> None:
    soundfile.write(sounds / "slow.wav", NOISE, 900)
    for source in (sounds, sounds / "slow.wav"):
        assert main(["extract", model, str(source), "--out", str(tmp_path / "out")]) == 3
        assert capsys.readouterr().err.startswith(f"error: {sounds / 'slow.wav'}: the header says 900 Hz")
        assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    assert main(["extract", model, str(sounds), "--out", str(tmp_path / "mine")]) == 3
    assert not list((tmp_path / "mine").iterdir())  # a folder that was there stays


def test_audio_files_without_names(tmp_path: Path) -> None:
    """Parquet whose paths are null, without an ending, or lead out of the folder."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, of the extra parquet, is absent")
    from pyarrow import parquet

    sound = wav_bytes((3000 * NOISE).astype(np.int16))
    rows = [{"bytes": sound, "path": path} for path in (None, "1b607f504e9c", "../../x.wav")]
    parquet.write_table(pyarrow.table({"audio": rows}), tmp_path / "h.parquet")
    assert main(["data", "import", str(tmp_path / "h.parquet"), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out" / "audio").rglob("*.wav"))) == 3 and not list(tmp_path.rglob("../x.wav"))
    assert main(["data", "validate", str(tmp_path / "out" / "manifest.jsonl")]) == 0


def test_short_waveforms_among_long_ones(model: str, tmp_path: Path) -> None:
    for number, samples in enumerate((98399, 1280, 200, 1)):
        write_wav(tmp_path / f"{number}.wav", (3000 * np.resize(NOISE, samples)).astype(np.int16))
    manifest = lines(tmp_path / "m.jsonl", *({"audio_filepath": f"{number}.wav"} for number in range(4)))
    for name, more in (("all", []), ("each", ["--max-batch-size", "1"])):
        assert main(["extract", model, manifest, "--out", str(tmp_path / name), *more]) == 0
    for path in (tmp_path / "all").glob("*.npy"):
        np.testing.assert_allclose(np.load(path), np.load(tmp_path / "each" / path.name), atol=1e-4)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_an_mp3_is_as_long_as_it_decodes(rate: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a" / "a.mp3", np.resize(NOISE, int(1.7 * rate)), rate, format="MP3")
    assert main(["data", "scan", str(tmp_path / "a"), str(tmp_path / "m.jsonl")]) == 0
    samples, _ = soundfile.read(tmp_path / "a" / "a.mp3")
    assert json.loads((tmp_path / "m.jsonl").read_text())["duration"] == len(samples) / rate
    assert main(["data", "validate", str(tmp_path / "m.jsonl")]) == 0


@pytest.mark.parametrize("command", ["extract", "tokenize", "transcribe", "probe"])
def test_a_model_that_is_not_finite_gives_no_result(
    command: str, sounds: Path, tmp_path: Path, capsys: Captured
) -> None:
    """9: one NaN among the weights, as of a run that went astray; the utterance is named and nothing is written."""
    cfg = Config.preset("tiny", ["encoder.n_layers=1"])
    params, state = init(key(0), cfg)
    params["encoder"]["layers"][0]["norm_out"]["weight"][0] = float("nan")
    checkpoint.save(tmp_path / "model", params, state, cfg)
    head = init_head(key(1), cfg, Design(0), 1)
    made = Recogniser(params, state, head, cfg, Design(0), TokenList(("a",)))
    save_recogniser(tmp_path / "recogniser", made, cfg.to_dict(), {})
    both = ({"audio_filepath": f"sounds/{name}.wav", "kind": name, "text": "a"} for name in "ab")
    manifest, out = lines(tmp_path / "m.jsonl", *both), ["--out", str(tmp_path / "out")]
    words = {
        "transcribe": [str(tmp_path / "recogniser"), manifest, *out],
        "probe": [str(tmp_path / "model"), "--label", "kind", "--train", manifest, "--test", manifest],
    }.get(command, [str(tmp_path / "model"), manifest, *out])
    assert main([command, *words]) == 3
    told = capsys.readouterr().err
    assert f"{manifest}:" in told and "what the model makes of it is not finite" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokens", ["--tokens=characters", "--pieces=30000"])
def test_a_letter_in_two_spellings_and_pieces_that_are_not_there(
    tokens: str, model: str, sounds: Path, tmp_path: Path, capsys: Captured
) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece, of the extra text, is absent")
    entries = [
        {"audio_filepath": f"sounds/{name}.wav", "text": normalize(form, "né")}
        for name, form in (("a", "NFC"), ("b", "NFD"))
    ]
    manifest = lines(tmp_path / "m.jsonl", *entries)
    words = ["finetune-ctc", model, f"data.train={manifest}", f"data.valid={manifest}", "data.num_workers=0", tokens]
    assert main([*words, "trainer.max_steps=1", "trainer.device=cpu", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert f"1 line in Unicode's form NFD, where others have NFC: {manifest}:2" in told
    assert ("the transcripts have no more than" in told) == (tokens == "--pieces=30000")
    assert count_errors([(normalize("NFD", "né"), "né")]).wrong_characters == 0
