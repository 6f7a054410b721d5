"""Utterances longer than a batch: read in parts, computed in windows, joined in a file without a name.

Memory holds one window, whatever the recording's length (``nest_fn.recording``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nest_fn.config import Config
from nest_fn.layers.types import Tensor
from nest_fn.recording.mel import Read
from nest_fn.recording.reach import encoder_reach
from nest_fn.recording.windows import Piece
from nest_fn.train.data.corpus.reading import read_entry
from nest_fn.train.data.dataset import Dataset

from .inference import ALONE, Job

_MORE = 1  # seconds read before and after a part, so that resampling has its neighbours
_REPORT_S = 5.0  # seconds between two reports of progress


class Recording(NamedTuple):
    """A long utterance of a dataset."""

    number: int  # index in the manifest
    samples: int
    read: Read


def recordings(dataset: Dataset, device: torch.device, job: Job = ALONE) -> Iterator[Recording]:
    """The utterances that the batch plan leaves out as too long; of several ranks each gets its part of them.

    Ends early if ``job.stopped`` becomes true. Reading raises ``DataError``.
    """
    for index in long_indices(dataset)[job.ranks.rank :: job.ranks.world]:
        if job.stopped():
            return
        yield Recording(index, _samples(dataset, index), _reader(dataset, index, device))


def long_indices(dataset: Dataset) -> list[int]:
    """Indices of the utterances that are longer than a batch."""
    return [] if dataset.weight is None else np.flatnonzero(dataset.weight == 0).tolist()


class StopAsked(Exception):
    """A stop was asked for while a recording was being computed."""


def until_stopped(pieces: Iterator[Piece], frames: int, seconds: float, job: Job) -> Iterator[Piece]:
    """The pieces of a recording of so many frames; the reporter is told how far it is, at most every 5 s.

    Raises ``StopAsked``.
    """
    reported = time.monotonic()
    for piece in pieces:
        if job.stopped():
            raise StopAsked
        now = time.monotonic()
        if now - reported > _REPORT_S:
            reported = now
            done = round(seconds * piece.begin / frames)
            job.reporter.progress(done, round(seconds), {"seconds": done, "of_seconds": round(seconds)})
        yield piece


def window_settings(cfg: Config, dataset: Dataset) -> dict[str, object]:
    """What the result of long utterances depends on, for the origin of an output: the windows' length, if it does."""
    exact = encoder_reach(cfg.encoder) is not None
    return {} if exact or not long_indices(dataset) else {"window_s": dataset.config.batch_seconds}


def joined(pieces: Iterator[Sequence[NDArray[Any]]], axis: int, length: int, folder: Path) -> list[NDArray[Any]]:
    """Arrays put together along ``axis``, ``length`` long in all, in files of ``folder`` that have no name."""
    made: list[NDArray[Any]] = []
    begin = 0
    for piece in pieces:
        made = made or [_room(array, axis, length, folder) for array in piece]
        end = begin + piece[0].shape[axis]
        for whole, array in zip(made, piece, strict=True):
            whole[(slice(None),) * axis + (slice(begin, end),)] = array
        begin = end
    if begin != length:
        raise ValueError(f"joined: {length} frames wanted, {begin} came.")
    return made


def _room(like: NDArray[Any], axis: int, length: int, folder: Path) -> NDArray[Any]:
    shape = (*like.shape[:axis], length, *like.shape[axis + 1 :])
    with TemporaryFile(dir=folder) as file:  # the map keeps it
        return np.memmap(file, like.dtype, "w+", shape=shape)


def _samples(dataset: Dataset, index: int) -> int:
    """Samples that the file really has of an utterance, at most the planned number."""
    planned = int(dataset.length[index])
    tail = min(planned, 2 * dataset.sample_rate)
    return planned - tail + len(_read_part(dataset, index, planned - tail, tail))


def _reader(dataset: Dataset, index: int, device: torch.device) -> Read:
    def read(first: int, count: int) -> Tensor:
        return torch.from_numpy(_read_part(dataset, index, first, count)).to(device)

    return read


def _read_part(dataset: Dataset, index: int, first: int, count: int) -> NDArray[np.int16]:
    """Samples ``[first, first + count)`` of an utterance, the same as if it was read as a whole.

    The part read begins at a whole second, where the samples of any two rates coincide.
    """
    rate = dataset.sample_rate
    begin = max(0, first // rate - _MORE)
    end = min(-(-(first + count) // rate) + _MORE, float(dataset.manifest.duration[index]))
    part = read_entry(dataset.manifest, index, dataset.config, rate, begin, end)
    return part[first - begin * rate :][:count]
