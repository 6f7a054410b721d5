"""Chooses the static batch shapes of a run: a pure function of the lengths and the batching settings.

Bucket ``k`` has ``rows[k]`` rows of ``width[k]`` samples. Of all choices of at most ``num_buckets`` widths, the one
with the least padding is taken (exact dynamic programming over the histogram of lengths). ``N`` samples have ``N // 160
+ 1`` spectrogram frames, so a width ``N = 10240 m - 160`` has ``64 m`` of them, or ``8 m`` encoder frames, a multiple
that matrix units run fast on. Up to 3.8 s, where steps of 0.64 s would pad too much, widths are ``2560 m - 160``, or
``2 m`` encoder frames. A batch has as many rows as ``batch_seconds`` holds; if a corpus has so few batches that empty
rows in the last ones matter, a smaller budget is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nest_fn.config.training import DataConfig
from nest_fn.train.errors import UsageError

_HOP = 160  # samples from one spectrogram frame to the next
_FINE = 16 * _HOP  # samples in 2 encoder frames
_COARSE = 4  # fine units in 8 encoder frames
_SHORT = 24  # fine units up to which a width need not be a multiple of 8 encoder frames: 3.8 s
_MAX_CANDIDATES = 1024
_FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the budget, tried in turn
_SAVING = 0.02  # fraction of the samples that a smaller budget must save to be used


@dataclass(frozen=True)
class Shapes:
    """The static batch shapes of a run, narrow to wide: int64 ``[K]`` each."""

    width: NDArray[np.int64]  # samples
    rows: NDArray[np.int64]

    def bucket(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The narrowest bucket that holds each length: ``[n] -> [n]``."""
        return np.searchsorted(self.width, lengths)


def choose_shapes(lengths: NDArray[np.int64], config: DataConfig, sample_rate: int = 16000) -> Shapes:
    """The shapes with the least padding for lengths ``[n]``, in samples.

    There are none for no lengths. Raises ``UsageError`` if the budget is too small.
    """
    if not len(lengths):
        return Shapes(np.zeros(0, np.int64), np.zeros(0, np.int64))
    choices = _widths(lengths, config.num_buckets)
    best, least = _best(choices, lengths, config, sample_rate, _FRACTIONS[0])
    for fraction in _FRACTIONS[1:]:
        if fraction * config.batch_seconds * sample_rate >= config.row_multiple * int(lengths.max()):
            shapes, padded = _best(choices, lengths, config, sample_rate, fraction)
            if padded < (1 - _SAVING) * least:
                best, least = shapes, padded
    return best


def batch_counts(shapes: Shapes, counts: NDArray[np.int64]) -> list[int]:
    """The number of batches of each bucket, for ``counts`` utterances ``[K]``, if left-over utterances may move up."""
    batches, carried = [], 0
    for bucket, own in enumerate(counts.tolist()):
        full, left = divmod(carried + own, int(shapes.rows[bucket]))
        carried = left if left and moves_up(shapes, bucket, left) else 0
        batches.append(full + bool(left and not carried))
    return batches


def moves_up(shapes: Shapes, bucket: int, left: int) -> bool:
    """Whether ``left`` utterances, too few for a full batch, need less padding in the next wider bucket than here."""
    if bucket + 1 == len(shapes.width):
        return False
    return left * int(shapes.width[bucket + 1]) <= int(shapes.rows[bucket] * shapes.width[bucket])


def _best(
    choices: list[NDArray[np.int64]], lengths: NDArray[np.int64], config: DataConfig, sample_rate: int, fraction: float
) -> tuple[Shapes, int]:
    """The choice of widths whose batches hold the fewest samples, and the number of these samples."""
    budget = round(fraction * config.batch_seconds * sample_rate)
    tried = []
    for number, width in enumerate(choices):
        shapes = Shapes(width, _rows(width, lengths, budget, config, sample_rate))
        batches = batch_counts(shapes, np.bincount(shapes.bucket(lengths), minlength=len(width)))
        padded = int((np.array(batches) * shapes.rows * shapes.width).sum())
        tried.append((padded, number, shapes))
    padded, _, shapes = min(tried, key=lambda choice: choice[:2])
    return shapes, padded


def _rows(
    width: NDArray[np.int64], lengths: NDArray[np.int64], budget: int, config: DataConfig, sample_rate: int
) -> NDArray[np.int64]:
    """Rows of each bucket: multiples of ``row_multiple`` within the budget, and not more than there are utterances."""
    multiple = config.row_multiple
    most = min(config.max_batch_size // multiple, -(-len(lengths) // multiple)) * multiple
    if most < multiple:
        raise UsageError(f"data: max_batch_size {config.max_batch_size} is below row_multiple {multiple}; raise it")
    longest = int(lengths.max())
    rows = np.minimum(budget // width // multiple * multiple, most)
    if multiple * longest > budget:
        raise UsageError(
            f"data: batch_seconds {config.batch_seconds} cannot hold {multiple} rows of the longest utterance, "
            f"{longest / sample_rate:.2f} s; raise batch_seconds, lower max_duration or row_multiple"
        )
    return np.maximum(rows, multiple)  # rounding the width up may exceed the budget


def _widths(lengths: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    """The best choices of 1, 2, ... ``most`` widths: those with the least sum of widths over all utterances."""
    units = -(-(lengths + _HOP) // _FINE)
    grid = _COARSE * max(1, -(-int(units.max()) // (_COARSE * _MAX_CANDIDATES)))
    units = np.where(units <= _SHORT, units, -(-units // grid) * grid)
    units, counts = np.unique(units, return_counts=True)
    candidates = units * _FINE - _HOP  # [m]
    below = np.concatenate([[0], np.cumsum(counts)])  # [m + 1] utterances narrower than each candidate
    # last[i, j]: cost of a widest bucket that holds candidates i..j; before[i]: least cost of all below i.
    last = (below[None, 1:] - below[:-1, None]) * candidates.astype(np.float64)
    last[np.tril_indices(len(candidates), -1)] = math.inf
    before = np.full(len(candidates), math.inf)
    before[0] = 0.0
    links: list[NDArray[np.int64]] = []
    choices = []
    for _ in range(min(most, len(candidates))):
        total = before[:, None] + last
        links.append(total.argmin(axis=0))
        choices.append(candidates[_chain(links)])
        before = np.concatenate([[math.inf], total.min(axis=0)[:-1]])
    return choices


def _chain(links: list[NDArray[np.int64]]) -> list[int]:
    """The widest candidate of each bucket, narrow to wide, by backtracking from the widest bucket."""
    end, chain = len(links[0]) - 1, []
    for link in reversed(links):
        chain.append(end)
        end = int(link[end]) - 1
    return chain[::-1]
