"""Faults of checkpoints, runs and configs for ``tests.show_faults``, and the list of all of its cases.

Each case breaks one thing, gives a command, asserts what is promised, and returns what a person saw of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nest_fn.checkpoint.folder import META, _digest, _sealed
from nest_fn.checkpoint.retention import step_path
from nest_fn.train.data.corpus.manifest import write_manifest
from tests import show_faults_audio as audio
from tests import show_faults_disks as disks
from tests import show_faults_speech as speech
from tests.show_faults_stage import EVERY, STEPS, Row, Stage, ended

LAST = STEPS - EVERY  # the newest checkpoint of a run that was cut off


# Checkpoints.


def _spoilt(stage: Stage, name: str, spoil: Callable[[Path], Any]) -> Path:
    """A run cut off at its third checkpoint, whose parameters are spoilt."""
    run = stage.as_at(LAST, name)
    spoil(_params(run))
    return run


def _params(run: Path) -> Path:
    (file,) = step_path(run / "checkpoints", LAST).glob("params.*")
    return file


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _falls_back(stage: Stage, fault: str, run: Path, words: str) -> list[Row]:
    """``must`` refuses; ``auto`` takes the checkpoint before and says so."""
    strict = stage.train(run, "--resume", "must").expect(4, words + ".*auto would take the one before")
    seen = stage.train(run).expect(0, f"warning: .*{words}.*resumed at step {LAST - EVERY}")
    stage.same_end(run)
    again = f"{EVERY} steps, made again; the run ends with the undisturbed one's bytes"
    return [
        stage.row(f"{fault}, `--resume must`", strict, "nothing: no step was made"),
        stage.row(f"{fault}, `--resume auto`", seen, again),
    ]


def flipped_bit(stage: Stage) -> list[Row]:
    """One bit of the newest checkpoint's parameters is flipped."""
    run = _spoilt(stage, "flipped", _flip)
    return _falls_back(stage, "one bit flipped in the newest checkpoint", run, "its bytes changed")


def cut_checkpoint(stage: Stage) -> list[Row]:
    """The newest checkpoint's parameters are cut short."""
    run = _spoilt(stage, "cut", lambda file: os.truncate(file, file.stat().st_size // 2))
    return _falls_back(stage, "newest checkpoint cut short", run, "it is cut short or changed")


class _Payload:
    """What an attacker's pickle holds: unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _is_live(file: Path, mark: Path) -> None:
    """Assert that nothing ran so far, and that a careless reader would have run it."""
    assert not mark.exists(), "the pickle ran"
    torch.load(file, weights_only=False)
    mark.rmdir()


def wicked_ckpt(stage: Stage) -> Row:
    """A .ckpt whose pickle runs code is given to nest-fn convert."""
    file, mark = stage.folder / "wicked.ckpt", stage.folder / "harm"
    torch.save({"state_dict": {"x": _Payload(mark)}, "hyper_parameters": {}}, file)
    seen = stage.command("convert", str(file), str(stage.folder / "converted"))
    seen.expect(4, "mkdir, which could run code")
    assert not (stage.folder / "converted").exists()
    _is_live(file, mark)
    return stage.row("malicious pickle in a .ckpt, `nest-fn convert`", seen, "nothing: its code did not run")


def wicked_checkpoint(stage: Stage) -> Row:
    """A run's newest checkpoint holds a pickle that runs code, and digests that fit."""
    mark = stage.folder / "harm"
    run = _spoilt(stage, "wicked", lambda file: torch.save({"tensors": {"x": _Payload(mark)}, "metadata": {}}, file))
    file, meta = _params(run), step_path(run / "checkpoints", LAST) / META
    content = json.loads(meta.read_text())
    del content["sha256"]
    content["files"][file.name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    meta.write_text(_sealed(content))
    seen = stage.train(run).expect(4, re.escape(str(file)))
    _is_live(file, mark)
    _flip(file)  # so that the one before it is taken
    stage.recovers(run)
    return stage.row("malicious pickle in a checkpoint, digests forged to fit", seen, "nothing: its code did not run")


# Runs.


def two_writers(stage: Stage) -> Row:
    """A second process is started on the folder of a run that goes on."""
    run = stage.folder / "two"
    with stage.paused(run) as first:
        seen = stage.train(run).expect(4, f"process {first.pid} on .* is writing here")
    ended(first).expect(0, f"step {STEPS}/{STEPS}")
    stage.same_end(run)
    return stage.row("second process on the same run folder", seen, "nothing: the first one ends with the usual bytes")


def changed_manifest(stage: Stage) -> list[Row]:
    """The manifest has one line less and the config another dropout between save and resume."""
    run, other = stage.as_at(LAST, "changed"), stage.folder / "other.jsonl"
    write_manifest(other, stage.entries[:-1])
    changes = [f"data.train={other}", "encoder.dropout=0.2"]
    seen = stage.train(run, *changes)
    seen.expect(4, r"encoder\.dropout: was 0\.1, is 0\.2; data: the manifests .*--allow-changes")
    stage.intact(run, LAST)
    stage.recovers(stage.as_at(LAST, "changed_not"))
    allowed = stage.train(run, *changes, "--allow-changes")
    allowed.expect(0, f"no longer one: .*resumed at step {LAST}.*step {STEPS}/{STEPS}")
    stage.intact(run, STEPS)
    return [
        stage.row("manifest and dropout changed between save and resume", seen, "nothing: no step was made"),
        stage.row("the same with `--allow-changes`", allowed, "nothing; that the run is no longer one is said"),
    ]


def renamed_key(stage: Stage) -> Row:
    """A key of the config file is misspelt."""
    file = stage.folder / "misspelt.yaml"
    shown = stage.command("config", "show", "tiny").out
    file.write_text(shown.replace("d_model:", "d_modell:", 1))
    assert "d_modell:" in file.read_text()
    seen = stage.command("pretrain", "-c", str(file), "--folder", str(stage.folder / "none"))
    seen.expect(2, r"d_modell.*did you mean 'd_model'")
    assert not (stage.folder / "none").exists()
    return stage.row("renamed config key", seen, "nothing: no step was made")


CASES: list[Callable[[Stage], Row | list[Row]]] = [
    disks.full, disks.filled, disks.file_limit, disks.read_only, disks.becomes_read_only,
    flipped_bit, cut_checkpoint, wicked_ckpt, wicked_checkpoint, two_writers, changed_manifest, renamed_key,
    audio.cut, audio.not_finite, audio.silent_batch, audio.one_hour, speech.removed_audio,
    speech.unheard, speech.unheard_disk, speech.hangup,
]  # fmt: skip
