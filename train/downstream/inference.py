"""Applies a trained model to audio files: loads the model, and reads the utterances in batches by length."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nest_fn.config import Config, DataConfig
from nest_fn.interop.convert import read_any
from nest_fn.layers.types import Params, State, Tensor
from nest_fn.train.data.corpus.audio import AUDIO_SUFFIXES, audio_info
from nest_fn.train.data.corpus_tools import audio_files
from nest_fn.train.data.dataset import Dataset, load_batch, open_dataset
from nest_fn.train.errors import DataError


class Model(NamedTuple):
    """The model of a checkpoint."""

    params: Params
    state: State
    cfg: Config


class Utterances(NamedTuple):
    """A batch without empty rows."""

    number: NDArray[np.int64]  # [B] index in the manifest
    audio: Tensor  # int16 [B, N]
    lengths: Tensor  # int64 [B] samples


def load_model(path: str | Path) -> Model:
    """Load any checkpoint, ours or the reference's, or a run folder's newest valid one. Raises ``CheckpointError``."""
    return Model(*read_any(path))


def open_audio(
    source: str | Sequence[str], cfg: Config, scratch: Path | None = None, *, batch_seconds: float = 60.0,
    max_batch_size: int = 256, min_audio: float = 0.0,
) -> Dataset:  # fmt: skip
    """A dataset of all utterances of manifests, of a folder, or of one audio file, of any length, mixed to mono.

    For a folder or an audio file, a manifest is written into the folder ``scratch``. Raises ``DataError``.
    """
    files = [source] if isinstance(source, str) else list(source)
    if len(files) == 1 and (Path(files[0]).is_dir() or files[0].lower().endswith(AUDIO_SUFFIXES)):
        if scratch is None:
            raise DataError(f"{files[0]}: want a manifest here; make one with nest-fn data scan")
        files = [str(_manifest_of(Path(files[0]), scratch / "input.jsonl"))]
    config = DataConfig(
        valid=tuple(files), min_duration=0.0, max_duration=86400.0, batch_seconds=batch_seconds,
        max_batch_size=max_batch_size, min_audio=min_audio, num_workers=0, channel="mix",
    )  # fmt: skip
    return open_dataset(config, 0, split="valid", sample_rate=cfg.sample_rate)


def utterances(dataset: Dataset) -> Iterator[Utterances]:
    """Every utterance once, the longest first."""
    for number, planned in enumerate(dataset.plan(0)):
        raw = load_batch(dataset, planned, 0, number)
        held = planned.index >= 0
        yield Utterances(planned.index[held], raw["audio"][held], raw["audio_len"][held])


def _manifest_of(source: Path, manifest: Path) -> Path:
    """Write a manifest of a file, or of all audio below a folder, with absolute paths."""
    paths = list(audio_files(str(source))) if source.is_dir() else [str(source)]
    if not paths:
        raise DataError(f"{source}: no audio file below it; looked for {', '.join(AUDIO_SUFFIXES)}")
    lines = [{"audio_filepath": os.path.abspath(path), "duration": audio_info(path).duration} for path in paths]
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return manifest
