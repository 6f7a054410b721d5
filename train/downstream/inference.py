"""Applies a trained model to audio files: loads the model, and reads the utterances in batches by length."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nest_fn.config import Config, DataConfig
from nest_fn.interop.convert import read_any
from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Params, State, Tensor
from nest_fn.train.data.audio_files.audio import AUDIO_SUFFIXES, audio_info
from nest_fn.train.data.audio_files.remote import cache_of, is_remote, remote
from nest_fn.train.data.audio_files.remote_cache import Cache
from nest_fn.train.data.corpus_tools import audio_files, looks_like_audio
from nest_fn.train.data.dataset import Dataset, batches, open_dataset
from nest_fn.train.distributed.collectives import Ranks
from nest_fn.train.errors import DataError
from nest_fn.train.reporter import NullReporter, Reporter

_REPORT_S = 5.0  # seconds between two reports of progress


class Model(NamedTuple):
    """The model of a checkpoint."""

    params: Params
    state: State
    cfg: Config


class Job(NamedTuple):
    """Who works on a corpus, whether to stop, and who is told how far it is."""

    ranks: Ranks = Ranks()
    stopped: Callable[[], bool] = lambda: False
    reporter: Reporter = NullReporter()


ALONE = Job()


class Utterances(NamedTuple):
    """A batch without empty rows."""

    number: NDArray[np.int64]  # [B] index in the manifest
    audio: Tensor  # int16 [B, N]
    lengths: Tensor  # int64 [B] samples
    hashes: Tensor  # int64 [B] which name the utterances


def load_model(path: str | Path) -> Model:
    """Load any checkpoint, ours or the reference's, or a run folder's newest valid one. Raises ``CheckpointError``."""
    return Model(*read_any(path))


def place(model: Model, cfg: Config, device: torch.device) -> Model:
    """The model on a device, with parameters in ``trainer.precision``, and a job's settings as its config."""
    dtype = torch.bfloat16 if cfg.trainer.precision == "bf16" else None
    params = tree_map(lambda leaf: leaf.to(device, dtype), model.params)
    return Model(params, tree_map(lambda leaf: leaf.to(device), model.state), cfg)


def open_audio(
    source: str | Sequence[str], cfg: Config, scratch: Path | None = None, *, data: DataConfig | None = None
) -> Dataset:
    """A dataset of all utterances of manifests, of a folder, or of one audio file, of any length, mixed to mono.

    An utterance that no batch can hold is in none (``recordings.py``). ``data`` has other settings of how it is read.
    For a folder or an audio file, a manifest is written into the folder ``scratch``. Raises ``DataError``.
    """
    files = [source] if isinstance(source, str) else list(source)
    made = len(files) == 1 and (Path(files[0]).is_dir() or looks_like_audio(files[0]))
    if made:
        if scratch is None:
            raise DataError(f"{files[0]}: want a manifest here; make one with nest-fn data scan")
        files = [str(_manifest_of(files[0], scratch / "input.jsonl", None if data is None else cache_of(data)))]
    if data is None:
        data = DataConfig(
            min_duration=0.0, max_duration=1e9, batch_seconds=60.0, min_audio=0.0, num_workers=0, channel="mix"
        )
    longest = data.batch_seconds / data.row_multiple
    opened = open_dataset(
        replace(data, valid=tuple(files)), 0, split="valid", sample_rate=cfg.sample_rate, longest=longest
    )
    return replace(opened, manifest=replace(opened.manifest, made=made))


def not_finite(dataset: Dataset, index: int) -> DataError:
    """The error for an utterance of which a model makes NaN or infinities."""
    return DataError(
        f"{dataset.manifest.where(index)}: what the model makes of it is not finite; look at it with nest-fn data "
        "validate, or at the model's weights"
    )


def utterances(dataset: Dataset, job: Job = ALONE) -> Iterator[Utterances]:
    """Every utterance that a batch can hold, the longest first; of several ranks each gets its rows of every batch.

    Ends early if ``job.stopped`` becomes true. The reporter is told of the seconds of audio done, at most every 5 s.
    """
    number = {dataset.manifest.identity(index): index for index in range(len(dataset.manifest))}
    ranks, plan = job.ranks, dataset.plan(0)
    if not len(plan):
        return
    total, done, count = int(dataset.length.sum()) // dataset.sample_rate, 0, 0
    started = reported = time.monotonic()
    stream = batches(dataset, epochs=1, rank=ranks.rank, world=ranks.world, stopped=job.stopped)
    for raw in stream:
        if job.stopped():
            return
        held = [row for row, name in enumerate(raw["ids"]) if name]
        if held:
            indices = np.array([number[raw["ids"][row]] for row in held], np.int64)
            yield Utterances(indices, raw["audio"][held], raw["audio_len"][held], raw["utterance"][held])
        index = plan.batch(raw["batch"]).index  # those of all ranks
        done, count = done + int(dataset.length[index[index >= 0]].sum()), count + int((index >= 0).sum())
        now = time.monotonic()
        if now - reported > _REPORT_S:
            reported, seconds = now, done / dataset.sample_rate
            rate = round(seconds / (now - started), 2)
            values = {"utterances": count, "of": len(dataset.manifest), "audio_seconds_per_second": rate}
            job.reporter.progress(int(seconds), total, values)


def _manifest_of(source: str, manifest: Path, cache: Cache | None) -> Path:
    """Write a manifest of a file or an address, or of all audio below a folder, with absolute paths."""
    if is_remote(source):
        duration = audio_info(remote(source, cache)).duration
        return _write_lines([{"audio_filepath": source, "duration": duration}], manifest)
    paths = list(audio_files(source)) if Path(source).is_dir() else [source]
    if not paths:
        raise DataError(f"{source}: no audio file below it; looked for {', '.join(AUDIO_SUFFIXES)}")
    try:
        lines = [{"audio_filepath": os.path.abspath(path), "duration": audio_info(path).duration} for path in paths]
    except DataError as error:
        if paths == [source]:
            raise
        raise DataError(f"{error}; nest-fn data scan makes a manifest without such files") from error
    return _write_lines(lines, manifest)


def _write_lines(lines: Sequence[Mapping[str, object]], manifest: Path) -> Path:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return manifest
