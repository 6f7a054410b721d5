"""Faults of audio for ``tests.show_faults``: cut, not finite, silent, far too long."""

from __future__ import annotations

import json
import re
import struct
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np

from nest_fn.config import Config
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.manifest import write_manifest
from nest_fn.train.data.dataset import batches, open_dataset
from tests.show_faults_stage import NOTHING, SMALL, STEPS, Row, Stage

HOUR_LIMIT = 6 << 30  # bytes of address space that the one-hour batch may have


@contextmanager
def _replaced(stage: Stage, name: str, content: bytes) -> Iterator[None]:
    """Another content of an audio file for a while."""
    path = stage.folder / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def cut(stage: Stage) -> Row:
    """A WAV file is cut in the middle."""
    run, whole = stage.folder / "cut_audio", (stage.folder / "a2.wav").read_bytes()
    with _replaced(stage, "a2.wav", whole[: len(whole) // 2]):
        seen = stage.train(run).expect(3, r"train\.jsonl:3: .*a2\.wav")
    stage.train(run).expect(0, f"step {STEPS}/{STEPS}")
    stage.same_end(run)
    return stage.row("WAV file cut in the middle", seen, NOTHING)


def _nan_wav(seconds: float) -> bytes:
    """Float samples, one of them NaN."""
    count = round(seconds * 16000)
    data = np.where(np.arange(count) == 777, np.nan, 0.1).astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def not_finite(stage: Stage) -> list[Row]:
    """A float WAV file holds a NaN."""
    run, row = stage.folder / "nan", "NaN in a float WAV file"
    with _replaced(stage, "a2.wav", _nan_wav(float(str(stage.entries[2]["duration"])))):
        seen = stage.train(run).expect(3, r"train\.jsonl:3: .*a2\.wav.*NaN")
        lenient = ["data.on_error=zero_weight", "data.max_bad_fraction=0.1"]
        going = stage.train(stage.folder / "nan_going", *lenient).expect(0, rf"a2\.wav.*NaN.*step {STEPS}/{STEPS}")
    stage.intact(stage.folder / "nan_going", STEPS)
    stage.train(run).expect(0, f"step {STEPS}/{STEPS}")
    stage.same_end(run)
    times = going.err.count("a2.wav")
    assert times == STEPS // 8, f"told {times} times in {STEPS // 8} epochs"
    return [
        stage.row(row, seen, NOTHING),
        stage.row(
            f"{row}, `data.on_error=zero_weight`", going, f"this utterance alone, told in each of {times} epochs"
        ),
    ]


def silent_batch(stage: Stage) -> Row:
    """All utterances of a batch are zeros."""
    manifest, run = stage.folder / "silent.jsonl", stage.folder / "silent"
    for number in range(8):
        write_wav(stage.folder / f"zero{number}.wav", np.zeros(64000, np.int16))
    zeros = [{"audio_filepath": f"zero{number}.wav", "duration": 4.0} for number in range(8)]
    write_manifest(manifest, [*stage.entries, *zeros])  # longer than all others, so in batches of their own
    seen = stage.train(run, f"data.train={manifest}", "trainer.log_every=1").expect(0, f"step {STEPS}/{STEPS}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines), "not finite"
    cfg = Config.preset("tiny", [f"data.train={manifest}", *SMALL])
    silent = sum(not raw["audio"].any() for raw in islice(batches(open_dataset(cfg.data, cfg.trainer.seed)), STEPS))
    assert silent > 0, "no batch was silent"
    return stage.row("batches of nothing but zeros", seen, f"nothing: {silent} silent batches, every loss finite")


def one_hour(stage: Stage) -> list[Row]:
    """One file lasts an hour."""
    sound, manifest = stage.folder / "hour.wav", stage.folder / "hour.jsonl"
    minute = np.random.Generator(np.random.Philox(3)).normal(0, 500, 960_000).astype("<i2").tobytes()
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        for _ in range(60):
            file.writeframes(minute)
    write_manifest(manifest, [*stage.entries, {"audio_filepath": "hour.wav", "duration": 3600.0}])
    seen = stage.train(stage.folder / "hour", f"data.train={manifest}")
    seen.expect(0, r"left out: 1 utterances longer than max_duration=8\.0 s")
    large = ["data.max_duration=4000", "data.batch_seconds=4000", "--dry-run"]
    words = stage.words(stage.folder / "none", f"data.train={manifest}", *large)
    tried = stage.command(*words, prefix=["sh", "-c", f'ulimit -v {HOUR_LIMIT >> 10}; exec "$@"', "sh"])
    tried.expect(1, r"largest batch: 1 x 36.*out of memory .* 1 x 36\d\d\.\d\d s.*lower data\.")
    sound.unlink()
    (told,) = re.findall(r".*left out: 1 utt.*", seen.err)
    return [
        stage.row("file of one hour", seen._replace(out="", err=told), "nothing else: left out and told"),
        stage.row("the same, let in, `--dry-run` in 6 GiB", tried, "nothing: no step was made"),
    ]
