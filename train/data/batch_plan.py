"""The batch plan of an epoch: a pure function of (utterances, lengths, seed, epoch, batching settings).

Batches are planned for all ranks together and then divided over the ranks, so the order of utterances does not depend
on the number of ranks or workers. Every utterance occurs once per epoch, or as often as its weight says. Utterances
left over in a bucket move to the next wider one if that needs less padding; otherwise they form a batch that is filled
up with empty rows (index -1, loss weight 0), so that shapes stay static. A position in the plan is two integers:
(epoch, batch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nest_fn.train.hash_rng import copy_hash, random_words, stream_key

from .buckets import Shapes, moves_up


@dataclass(frozen=True, eq=False)
class PlannedBatch:
    """One batch, or one rank's part of it: the utterance in each row."""

    width: int  # samples
    row: NDArray[np.int64]  # [B] row in the batch of all ranks
    index: NDArray[np.int64]  # [B] utterance; -1: an empty row
    copy: NDArray[np.int64]  # [B] occurrence index within the epoch; 0: the first

    def part(self, rank: int, world: int, parts: int = 1) -> PlannedBatch:
        """One rank's rows, for ``parts`` micro-batches; empty rows are added so that all have equally many rows.

        Groups of ``parts`` rows are assigned to the ranks in turn. Micro-batch ``k`` consists of rows ``k, k + parts``,
        ... of each rank, so over all ranks it holds the same rows for any number of ranks. Raises ``ValueError``.
        """
        if not 0 <= rank < world:
            raise ValueError(f"plan: rank {rank} of {world} ranks; want 0 <= rank < {world}")
        extra = -len(self.row) % (world * parts)
        row = np.arange(len(self.row) + extra)
        index = np.concatenate([self.index, np.full(extra, -1)])
        copy = np.concatenate([self.copy, np.zeros(extra, np.int64)])
        own = row.reshape(-1, world, parts)[:, rank].ravel()
        return PlannedBatch(self.width, own, index[own], copy[own])


@dataclass(frozen=True)
class Plan:
    """The batches of one epoch: batch ``b`` has shape ``shape[b]`` and holds ``index[start[b]:start[b + 1]]``."""

    epoch: int
    shapes: Shapes
    shape: NDArray[np.int64]  # [batches]
    start: NDArray[np.int64]  # [batches + 1]
    index: NDArray[np.int64]  # [utterances of the epoch]
    copy: NDArray[np.int64]  # [utterances of the epoch]

    def __len__(self) -> int:
        return len(self.shape)

    def batch(self, number: int) -> PlannedBatch:
        """Batch ``number``, with the rows of all ranks. Raises ``IndexError``."""
        if not 0 <= number < len(self):
            raise IndexError(f"plan: batch {number} of {len(self)} in epoch {self.epoch}")
        shape = self.shape[number]
        rows = int(self.shapes.rows[shape])
        held = slice(int(self.start[number]), int(self.start[number + 1]))
        empty = rows - (held.stop - held.start)
        return PlannedBatch(
            int(self.shapes.width[shape]),
            np.arange(rows),
            np.concatenate([self.index[held], np.full(empty, -1)]),
            np.concatenate([self.copy[held], np.zeros(empty, np.int64)]),
        )

    def __iter__(self) -> Iterator[PlannedBatch]:
        return (self.batch(number) for number in range(len(self)))

    @property
    def padded_samples(self) -> int:
        """Samples that the epoch computes on, including padding and empty rows."""
        return int((self.shapes.width[self.shape] * self.shapes.rows[self.shape]).sum())

    def efficiency(self, lengths: NDArray[np.int64]) -> float:
        """Fraction of the computed samples that are audio; ``lengths`` as given to ``plan_epoch``."""
        return float(lengths[self.index].sum() / self.padded_samples)

    def largest(self) -> int:
        """The number of the batch with the most samples; run it first to check that memory suffices."""
        return int(np.argmax(self.shapes.width[self.shape] * self.shapes.rows[self.shape]))


def plan_epoch(
    lengths: NDArray[np.int64],
    utterance: NDArray[np.int64],
    shapes: Shapes,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    weight: NDArray[np.float64] | None = None,
) -> Plan:
    """Plan one epoch of utterances with ``lengths`` (samples ``[n]``) and id hashes ``utterance`` ``[n]``.

    ``weight`` ``[n]`` is how often each occurs per epoch (None: once). ``shuffle=False`` keeps the order of the
    utterances within a bucket and puts the widest buckets first.
    """
    index, copy = _occurrences(len(lengths), weight, seed, epoch)
    if shuffle:
        hashes = copy_hash(utterance[index], copy)
        order = np.argsort(random_words(stream_key(seed, "shuffle", epoch), hashes, 1)[:, 0], kind="stable")
        index, copy = index[order], copy[order]
    pieces = _cut(shapes, shapes.bucket(lengths[index]))
    if shuffle:
        numbers = np.arange(len(pieces))
        turn = np.argsort(random_words(stream_key(seed, "batches", epoch), numbers, 1)[:, 0], kind="stable").tolist()
    else:
        turn = range(len(pieces))[::-1]
    pieces = [pieces[number] for number in turn]
    places = np.concatenate([places for _, places in pieces]) if pieces else np.zeros(0, np.int64)
    start = np.cumsum([0, *(len(places) for _, places in pieces)])
    return Plan(epoch, shapes, np.array([shape for shape, _ in pieces], np.int64), start, index[places], copy[places])


def plan_stream(
    lengths: NDArray[np.int64],
    utterance: NDArray[np.int64],
    shapes: Shapes,
    *,
    seed: int,
    epoch: int = 0,
    batch: int = 0,
    shuffle: bool = True,
    weight: NDArray[np.float64] | None = None,
) -> Iterator[tuple[int, int, PlannedBatch]]:
    """Yield ``(epoch, batch, planned)`` from a position on, epoch after epoch without end.

    The position after an epoch's last batch is the start of the next epoch. Raises ``ValueError`` for later positions.
    """
    if epoch < 0 or batch < 0:
        raise ValueError(f"plan: position (epoch {epoch}, batch {batch}) is negative")
    while True:
        plan = plan_epoch(lengths, utterance, shapes, seed=seed, epoch=epoch, shuffle=shuffle, weight=weight)
        if batch > len(plan):
            raise ValueError(f"plan: position (epoch {epoch}, batch {batch}), but that epoch has {len(plan)} batches")
        for number in range(batch, len(plan)):
            yield epoch, number, plan.batch(number)
        epoch, batch = epoch + 1, 0


def _occurrences(
    count: int, weight: NDArray[np.float64] | None, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The utterances of an epoch: index, and copy, the occurrence index within the epoch.

    Utterance ``i`` with weight ``w`` has occurred ``floor(w e + u_i)`` times before epoch ``e``, where the ``u_i`` are
    evenly spaced in [0, 1) in a random order: a weight of one half alternates between two halves of the corpus.
    """
    if weight is None:
        return np.arange(count), np.zeros(count, np.int64)
    order = np.argsort(random_words(stream_key(seed, "weight", 0), np.arange(count), 1)[:, 0], kind="stable")
    spread = np.empty(count)
    for value in np.unique(weight):
        members = order[weight[order] == value]
        spread[members] = np.arange(len(members)) / len(members)
    times = (np.floor(weight * (epoch + 1) + spread) - np.floor(weight * epoch + spread)).astype(np.int64)
    index = np.repeat(np.arange(count), times)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)


def _cut(shapes: Shapes, bucket: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """Divide positions ``0..n-1``, whose buckets are given, into batches (shape, positions); see ``batch_counts``."""
    pieces: list[tuple[int, NDArray[np.int64]]] = []
    carried = np.zeros(0, np.int64)
    for shape, rows in enumerate(shapes.rows.tolist()):
        places = np.concatenate([carried, np.flatnonzero(bucket == shape)])
        full = len(places) // rows * rows
        pieces += [(shape, places[begin : begin + rows]) for begin in range(0, full, rows)]
        left = places[full:]
        carried = left if len(left) and moves_up(shapes, shape, len(left)) else np.zeros(0, np.int64)
        if len(left) and not len(carried):
            pieces.append((shape, left))
    return pieces
