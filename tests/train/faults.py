"""What the tests of the fault catalogue share: six whole utterances, and a training run that must refuse them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nest_fn.config import Config
from nest_fn.train.cli.main import main

Captured = pytest.CaptureFixture[str]


def entries() -> list[dict[str, Any]]:
    """The lines of a manifest of a0.wav..a5.wav."""
    return [{"audio_filepath": f"a{number}.wav", "duration": 1.5} for number in range(6)]


def write_entries(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Write m.jsonl."""
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(folder: Path, *overrides: str, steps: int = 2) -> int:
    """Two steps at the command line; the exit code."""
    small = ["encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "data.batch_seconds=8", "data.max_duration=8"]
    return main(["pretrain", "-c", "tiny", "--folder", str(folder / "run"), f"data.train={folder / 'm.jsonl'}",
                 f"trainer.max_steps={steps}", "trainer.save_every=2", *small, *overrides])  # fmt: skip


def refused(folder: Path, captured: Captured, code: int, pattern: str, *overrides: str) -> None:
    """Training ends with one message of this pattern."""
    assert train(folder, *overrides) == code
    told = captured.readouterr().err
    assert told.count("error: ") == 1 and "Traceback" not in told
    assert re.search(pattern, told, re.DOTALL), told
    assert not (folder / "run" / "lock").exists()


def config_of(folder: Path, *overrides: str) -> Config:
    """A toy over the folder's manifest."""
    tiny = ["encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "data.min_duration=0", "data.max_duration=8"]
    return Config.preset("tiny", [f"data.train={folder / 'm.jsonl'}", *tiny, *overrides])
