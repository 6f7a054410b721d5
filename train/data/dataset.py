"""Reads and collates batches from manifests, in the order of the batch plan.

A batch is a pure function of the files, the seed, the epoch and the plan: workers have no random state, so the batches
do not depend on the number of workers, and a run resumes at (epoch, batch) without reading earlier batches. Mixing
happens later, on the device: a batch holds each utterance and its noise separately. Rows are int16 from file to device.

An utterance shorter than ``min_audio`` is padded with silence (``pad``) or repeated (``repeat``) up to ``min_audio``,
which is then its length (reference 7.2, Q30). Empty rows of the plan, unreadable ones under ``on_error=zero_weight``,
and silent ones under ``skip_silent``, have ``audio_len`` 0 and ``weight`` 0: they keep their place in the plan, so that
the rows are the same on any number of ranks and after a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nest_fn.config.training import DataConfig
from nest_fn.train.errors import DataError, UsageError
from nest_fn.train.hash_rng import copy_hash

from .audio_files.remote import cache_of
from .batch_plan import Plan, PlannedBatch, plan_epoch, plan_stream
from .buckets import Shapes, choose_shapes
from .clips import ClipPool, draw_noise, load_clips, noise_words
from .corpus.manifest import load_manifest
from .corpus.manifest_table import Manifest
from .corpus.reading import read_entry
from .corpus.thread_map import ordered_map


class RawBatch(TypedDict):
    """One rank's part of a batch on the CPU, before mixing."""

    audio: Tensor  # int16 [B, N]
    audio_len: Tensor  # int64 [B] samples
    noise: Tensor  # int16 [B, N]; zeros where there is no noise manifest
    noise_len: Tensor  # int64 [B] samples; may be below audio_len: mixing then repeats the noise
    row: Tensor  # int64 [B] row in the batch of all ranks
    utterance: Tensor  # int64 [B] 63-bit hash that keys every draw for the utterance; 0: an empty row
    weight: Tensor  # float32 [B]; 0 for rows without loss
    ids: list[str]  # [B] "": an empty row
    epoch: int
    batch: int  # index in the epoch
    bad: list[str]  # messages about rows set to weight 0; empty unless on_error=zero_weight or skip_silent
    silent: list[str]  # manifest lines of the rows that skip_silent set to weight 0; these are not errors
    sent: NotRequired[Any]  # set by ``send`` of ``batches``: copies to a device that have been started


@dataclass(frozen=True)
class Dataset:
    """Everything that determines the batches; immutable."""

    manifest: Manifest
    length: NDArray[np.int64]  # [n] samples of each utterance in the plan
    shapes: Shapes
    config: DataConfig
    seed: int
    sample_rate: int = 16000  # Hz
    shuffle: bool = True
    weight: NDArray[np.float64] | None = None  # [n] occurrences per epoch; None: one
    noise: ClipPool | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the batches and their order; compared on resume."""
        config = self.config
        parts: tuple[Any, ...] = (
            self.manifest.digest, self.noise.manifest.digest if self.noise else None, self.seed, self.sample_rate,
            self.shapes.width.tolist(), self.shapes.rows.tolist(), self.shuffle, config.channel, config.short_audio,
            config.min_audio, None if self.weight is None else self.weight.tobytes().hex(),
        )  # fmt: skip
        parts += ("skip_silent",) if config.skip_silent else ()
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def plan(self, epoch: int) -> Plan:
        """The batches of one epoch."""
        return plan_epoch(
            self.length, self.manifest.utterance, self.shapes,
            seed=self.seed, epoch=epoch, shuffle=self.shuffle, weight=self.weight,
        )  # fmt: skip


def open_dataset(
    config: DataConfig, seed: int, *, split: str = "train", sample_rate: int = 16000, longest: float = math.inf
) -> Dataset:
    """Read the manifests of ``split`` (train or valid) and the noise, and choose the shapes.

    Validation is neither shuffled nor weighted. Utterances of more than ``longest`` seconds have weight 0: they are in
    the manifest and in no batch. Raises ``DataError`` and ``UsageError``.
    """
    train = split == "train"
    files, shards = (config.train, config.train_shards) if train else (config.valid, config.valid_shards)
    if not files:
        raise UsageError(f"data.{split} names no manifest; set it to one or more JSONL files")
    manifest = load_manifest(
        files, min_duration=config.min_duration, max_duration=config.max_duration, long=config.long,
        root=config.root, shards=shards, channel=config.channel, check_files=config.check_files,
        cache=cache_of(config), workers=config.num_workers,
    )  # fmt: skip
    least = max(1, round(config.min_audio * sample_rate))
    length = np.maximum(np.rint(manifest.duration * sample_rate).astype(np.int64), least)
    weight = _weights(manifest, config) if train else None
    if length.max() > longest * sample_rate:
        weight = np.where(length > longest * sample_rate, 0.0, 1.0 if weight is None else weight)
    often = length if weight is None else np.repeat(length, np.ceil(weight).astype(np.int64))
    return Dataset(
        manifest, length, choose_shapes(often, config, sample_rate), config, seed, sample_rate,
        shuffle=train and config.shuffle, weight=weight,
        noise=load_clips(config.noise, config, sample_rate) if config.noise else None,
    )  # fmt: skip


def batches(
    dataset: Dataset, *, epoch: int = 0, batch: int = 0, rank: int = 0, world: int = 1, parts: int = 1,
    epochs: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    send: Callable[[RawBatch], RawBatch] = lambda raw: raw,
) -> Iterator[RawBatch]:  # fmt: skip
    """One rank's batches in order from position (epoch, batch) on; without end, or for ``epochs`` more epochs.

    ``parts`` is the number of micro-batches per batch. ``num_workers`` threads prefetch ``prefetch`` batches; iteration
    ends early if ``stopped`` becomes true while it waits for a batch. A worker thread applies ``send`` to each batch
    that it has read. The position after a batch is its (epoch, batch + 1). The first silent utterance that
    ``skip_silent`` leaves out is reported in ``bad``; it does not count towards ``max_bad_fraction``. Raises
    ``DataError`` if an utterance, or more than ``max_bad_fraction`` of them, cannot be read (``on_error``).
    """
    config = dataset.config
    made = ordered_map(
        lambda work: send(load_batch(dataset, work.planned, work.epoch, work.batch)),
        _work(dataset, epoch, batch, rank, world, parts, epochs),
        workers=config.num_workers, ahead=config.prefetch, timeout_s=config.timeout_s, name="loader",
        stopped=stopped,
    )  # fmt: skip
    limit = config.max_bad_fraction * len(dataset.manifest) / world
    bad: list[str] = []
    current, reported = epoch, False
    for raw in made:
        if raw["epoch"] != current:
            current, bad = raw["epoch"], []
        bad += raw["bad"]
        if len(bad) > limit:
            shown = "\n  ".join(bad[:20])
            raise DataError(
                f"data: {len(bad)} utterances could not be read in epoch {current}, more than max_bad_fraction "
                f"{config.max_bad_fraction} of {len(dataset.manifest)}; validate the manifest\n  {shown}"
            )
        if raw["silent"] and not reported:
            reported = True
            raw["bad"].append(
                f"{raw['silent'][0]}: every sample is 0; it has weight 0, and so will all others like it "
                "(data.skip_silent)"
            )
        yield raw


def load_batch(dataset: Dataset, planned: PlannedBatch, epoch: int, number: int = 0) -> RawBatch:
    """Read and collate a planned batch. Raises ``DataError``, or adds it to ``bad`` with ``on_error=zero_weight``."""
    rows = len(planned.index)
    audio = np.empty((rows, planned.width), np.int16)
    noise = np.empty((rows, planned.width), np.int16)
    audio_len, noise_len = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    held = np.flatnonzero(planned.index >= 0)
    utterance = np.zeros(rows, np.int64)
    utterance[held] = copy_hash(dataset.manifest.utterance[planned.index[held]], planned.copy[held])
    word = noise_words(dataset.seed, epoch, utterance) if dataset.noise is not None else None
    bad: list[str] = []
    silent: list[str] = []
    filled = [(0, 0)] * rows
    for row in held.tolist():
        try:
            clip = read_utterance(dataset, int(planned.index[row]))
            if dataset.config.skip_silent and not clip.any():
                silent.append(dataset.manifest.where(int(planned.index[row])))
                continue
            added = np.zeros(0, np.int16)
            if dataset.noise is not None and word is not None:
                added = draw_noise(dataset.noise, word[row], len(clip))
        except DataError as error:
            if dataset.config.on_error != "zero_weight":
                raise
            bad.append(str(error))
            continue
        audio[row, : len(clip)], audio_len[row] = clip, len(clip)
        noise[row, : len(added)], noise_len[row] = added, len(added) or len(clip)
        filled[row] = len(clip), len(added)
    for row, (clip_end, noise_end) in enumerate(filled):  # the rest alone, for clearing all costs a pass over memory
        audio[row, clip_end:] = 0
        noise[row, noise_end:] = 0
    ids = [dataset.manifest.identity(i) if i >= 0 else "" for i in planned.index.tolist()]
    return RawBatch(
        audio=torch.from_numpy(audio), audio_len=torch.from_numpy(audio_len),
        noise=torch.from_numpy(noise), noise_len=torch.from_numpy(noise_len),
        row=torch.from_numpy(planned.row.copy()), utterance=torch.from_numpy(utterance),
        weight=torch.from_numpy((audio_len > 0).astype(np.float32)), ids=ids, epoch=epoch, batch=number, bad=bad,
        silent=silent,
    )  # fmt: skip


def read_utterance(dataset: Dataset, index: int) -> NDArray[np.int16]:
    """One utterance, at least ``min_audio`` and at most its planned length: int16 ``[n]``. Raises ``DataError``."""
    manifest, config = dataset.manifest, dataset.config
    clip = read_entry(manifest, index, config, dataset.sample_rate)[: int(dataset.length[index])]
    least = round(config.min_audio * dataset.sample_rate)
    if len(clip) >= least:
        return clip
    return np.resize(clip, least) if config.short_audio == "repeat" else np.pad(clip, (0, least - len(clip)))


class _Work(NamedTuple):
    """A worker's task: one planned batch."""

    epoch: int
    batch: int
    planned: PlannedBatch

    def __str__(self) -> str:
        return f"batch {self.batch} of epoch {self.epoch}"


def _work(
    dataset: Dataset, epoch: int, batch: int, rank: int, world: int, parts: int, epochs: int | None
) -> Iterator[_Work]:
    """The rank's parts of the planned batches."""
    stream = plan_stream(
        dataset.length, dataset.manifest.utterance, dataset.shapes, seed=dataset.seed, epoch=epoch, batch=batch,
        shuffle=dataset.shuffle, weight=dataset.weight,
    )  # fmt: skip
    for at_epoch, number, planned in stream:
        if epochs is not None and at_epoch >= epoch + epochs:
            return
        yield _Work(at_epoch, number, planned.part(rank, world, parts))


def _weights(manifest: Manifest, config: DataConfig) -> NDArray[np.float64] | None:
    """Occurrences of each utterance per epoch; None if all are 1. Raises ``UsageError``."""
    if config.weights is None:
        return None
    if len(config.weights) != len(manifest.files) or min(config.weights) < 0 or not sum(config.weights):
        raise UsageError(
            f"data.weights {config.weights} for {len(manifest.files)} manifests; give one number from 0 for each"
        )
    weight = np.array(config.weights, np.float64)[manifest.file]
    return None if (weight == 1).all() else weight
