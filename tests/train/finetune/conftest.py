"""A corpus of words of two tones, one a letter, and a model of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nest_fn import Config, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.train.data.audio_files.wav import write_wav

WORDS = {"ab": (400, 2500), "ba": (2500, 400), "b": (2500, 2500)}
DROPOUT = ("encoder.dropout=0", "encoder.dropout_att=0", "encoder.dropout_pre_encoder=0")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 words of a second in ``all.jsonl``, and ``model``."""
    folder = tmp_path_factory.mktemp("ctc")
    lines = []
    for index in range(24):
        word = list(WORDS)[index % 3]
        time = np.arange(8000) / 16000
        tones = [9000 * np.sin(2 * np.pi * pitch * time) for pitch in WORDS[word]]
        noise = np.random.default_rng(index).normal(0, 200, 16000)
        write_wav(folder / f"{index}.wav", (np.concatenate(tones) + noise).astype(np.int16))
        lines.append({"audio_filepath": f"{index}.wav", "duration": 1.0, "text": word})
    write_lines(folder / "all.jsonl", lines)
    cfg = Config.preset("tiny", DROPOUT)
    checkpoint.save(folder / "model", *init(key(0), cfg), cfg)
    return folder


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    """A manifest."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def finetuning(spoken: Path, out: Path, *more: str, train: Path | None = None, valid: Path | None = None) -> list[str]:
    """A command that fine-tunes on characters."""
    data = [f"data.train={train or spoken / 'all.jsonl'}", f"data.valid={valid or spoken / 'all.jsonl'}"]
    settings = ["data.num_workers=0", "data.batch_seconds=24", "optim.lr=3e-3", "optim.sched.name=constant",
                "optim.sched.warmup_ratio=null"]  # fmt: skip
    tokens = [] if "--tokens" in more or "--pieces" in more else ["--tokens", "characters"]
    return ["finetune-ctc", str(spoken / "model"), *data, *settings, *tokens, "--out", str(out), *more]
