"""``data import``: what lhotse and datasets write becomes a manifest that the other commands read."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.audio import read_audio
from nest_fn.train.data.audio_files.wav import wav_bytes, write_wav
from nest_fn.train.data.corpus.manifest import load_manifest

Captured = pytest.CaptureFixture[str]
SAMPLES = (3000 * np.sin(np.arange(32000) / 20)).astype(np.int16)


def recording(path: str, **more: Any) -> dict[str, Any]:
    """A recording as lhotse 1.x writes it."""
    source = {"type": "file", "channels": [0, 1], "source": path}
    return {"id": "rec", "sources": [source], "sampling_rate": 16000, "num_samples": 32000, "duration": 2.0,
            "channel_ids": [0, 1], **more}  # fmt: skip


def cut(number: int, **more: Any) -> dict[str, Any]:
    said = [{"id": "b", "recording_id": "rec", "start": 0.5, "duration": 0.5, "channel": 0, "text": "world",
             "speaker": "ann", "language": "en"},
            {"id": "a", "recording_id": "rec", "start": 0.0, "duration": 0.5, "channel": 0, "text": "hello",
             "speaker": "ann"}]  # fmt: skip
    return {"id": f"cut-{number}", "start": 0.25 * number, "duration": 1.0, "channel": 1, "supervisions": said,
            "recording": recording("a.wav"), "type": "MonoCut", **more}  # fmt: skip


def test_cuts_of_lhotse(tmp_path: Path, capsys: Captured) -> None:
    write_wav(tmp_path / "a.wav", np.stack([SAMPLES, SAMPLES // 2], axis=1))
    odd = [
        {"type": "MixedCut", "id": "mix", "tracks": []},
        cut(3, recording=recording("a.wav", transforms=[{"name": "Speed", "kwargs": {"factor": 1.1}}])),
        cut(3, recording=None, features={"type": "fbank"}),
        cut(3, recording={**recording("a.wav"), "sources": [{"type": "command", "channels": [0], "source": "sox"}]}),
        {"id": "cut-9", "duration": 1.0, "recording": recording("a.wav"), "type": "MonoCut"},
    ]
    beyond = [{"id": "c", "start": 0.5, "duration": 2.0, "text": "more than was said"}]
    lines = [cut(0), *odd, cut(1, channel=[0, 1], type="MultiCut", supervisions=beyond)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    words = ["data", "import", str(tmp_path / "cuts.jsonl.gz"), "--out", str(tmp_path / "out")]
    assert main(words) == 3
    told = capsys.readouterr().out
    for number, word in enumerate(("MixedCut", "transforms", "no recording", "command", "start"), 2):
        assert f"cuts.jsonl.gz:{number}: " in told and word in told
    assert "2 utterances" in told and "5 left out" in told
    first, second = (json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    assert first == {"audio_filepath": str(tmp_path / "a.wav"), "id": "cut-0", "offset": 0.0, "duration": 1.0,
                     "channel": 1, "text": "hello world", "speaker": "ann", "language": "en"}  # fmt: skip
    assert second["channel"] == [0, 1] and second["offset"] == 0.25 and "text" not in second
    assert main(["data", "validate", str(tmp_path / "out" / "manifest.jsonl")]) == 0
    assert main(words) == 0  # finished already
    (tmp_path / "other.jsonl").write_text(json.dumps(recording("a.wav")) + "\n")
    assert main([*words[:2], str(tmp_path / "other.jsonl"), *words[3:]]) == 2
    assert main([*words[:2], str(tmp_path / "other.jsonl"), "--out", str(tmp_path / "recordings")]) == 0
    assert load_manifest(tmp_path / "recordings" / "manifest.jsonl").duration.tolist() == [2.0]


def flac() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, SAMPLES, 16000, format="FLAC")
    return file.getvalue()


def table() -> Any:
    """Rows with a FLAC, a WAV, nothing, noise that is no audio, a path."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, of the extra parquet, is absent")
    audio = [{"bytes": flac(), "path": "x/one.flac"}, {"bytes": wav_bytes(SAMPLES), "path": None},
             {"bytes": None, "path": None}, {"bytes": b"no audio at all", "path": "bad.wav"},
             {"bytes": None, "path": "beside.wav"}]  # fmt: skip
    texts = [f"text {number}" for number in range(5)]
    return pyarrow.table({"audio": audio, "sentence": texts, "speaker_id": list(range(5)), "noise": [None] * 5})


@pytest.mark.parametrize("form", ["parquet", "arrow", "stream"])
def test_tables_with_audio(form: str, tmp_path: Path, capsys: Captured) -> None:
    made, folder = table(), tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    write_wav(folder / "beside.wav", SAMPLES)
    if form == "parquet":
        from pyarrow import parquet

        parquet.write_table(made, folder / "train-00000-of-00001.parquet")
    else:
        from pyarrow import ipc

        new = ipc.new_stream if form == "stream" else ipc.new_file  # datasets writes streams
        with new(folder / "data-00000-of-00001.arrow", made.schema) as writer:
            writer.write_table(made)
    assert main(["data", "import", str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().out
    assert "row 3: it has neither audio nor a path" in told and "row 4: " in told and "3 utterances" in told
    found = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["text"] for line in found] == ["text 0", "text 1", "text 4"]
    assert found[0]["audio_filepath"] == "audio/0000/00000000_one.flac" and found[0]["duration"] == 2.0
    assert found[0]["speaker_id"] == 0 and "noise" not in found[0]
    assert (tmp_path / "out" / found[0]["audio_filepath"]).read_bytes() == flac()
    assert found[2]["audio_filepath"] == str(folder / "beside.wav")
    assert sorted(os.listdir(tmp_path / "out" / "audio" / "0000")) == ["00000000_one.flac", "00000001.wav"]
    assert main(["data", "validate", str(tmp_path / "out" / "manifest.jsonl")]) == 0


def test_a_column_of_samples_and_a_choice_of_columns(tmp_path: Path, capsys: Captured) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, of the extra parquet, is absent")
    from pyarrow import parquet

    one = {"array": (SAMPLES / 32768).tolist(), "sampling_rate": 8000, "path": "a.wav"}
    parquet.write_table(pyarrow.table({"clean": [one], "noisy": [one]}), tmp_path / "t.parquet")
    words = ["data", "import", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "out")]
    assert main(words) == 2 and "2 columns of audio (clean, noisy)" in capsys.readouterr().err
    assert main([*words, "--audio-column", "none"]) == 2 and not (tmp_path / "out").exists()
    assert main([*words, "--audio-column", "clean"]) == 0
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert line["duration"] == 4.0
    np.testing.assert_array_equal(read_audio(tmp_path / "out" / line["audio_filepath"], sample_rate=8000), SAMPLES)


def test_what_is_no_corpus_is_named(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    for source in ("m.jsonl", "none.jsonl", "."):
        code = main(["data", "import", str(tmp_path / source), "--out", str(tmp_path / "out")])
        assert code == 2 + (source != ".") or code == 3, source
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
