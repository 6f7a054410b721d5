"""The distribution of masks against a slow loop written from reference 3, with draws of its own.

Kolmogorov and Smirnov's distance of two samples: one of ``draw_mask``, one of the loop. Both are seeded, so that a test
gives the same answer always; that the distance would show a probability 1.2 times as large is shown beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nest_fn.config.model import MaskingConfig
from nest_fn.layers import random
from nest_fn.masking import draw_mask

ROWS = 3000
PROBABILITY = {True: 0.01, False: 0.4}  # of a start at a frame where blocks overlap, else the share to mask
MODES = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "separate"])
Measure = Callable[[NDArray[np.bool]], NDArray[Any]]
LENGTHS = pytest.mark.parametrize("length", [100, 300, 700])
BLOCK = 40


def slow_row(
    make: np.random.Generator, length: int, probability: float, overlap: bool, force: bool
) -> NDArray[np.bool]:
    """One utterance's mask, a block at a time."""
    mask = np.zeros(length, bool)
    size = BLOCK
    if overlap:
        places = length - BLOCK
        count = make.binomial(places, probability)
        if force and count == 0:
            count = 1
        starts = make.choice(places, count, replace=False)
    else:
        count = math.ceil(length * probability / BLOCK)
        offset = make.integers(0, BLOCK)
        if (count + 1) * BLOCK > length:
            size = length // (count + 1)
        slots = length // size - 1
        starts = make.choice(slots, min(count, slots), replace=False) * size + offset
    for start in starts:
        mask[start : start + size] = True
    return mask


def slow(length: int, overlap: bool, factor: float = 1.0, force: bool = False) -> NDArray[np.bool]:
    """``[ROWS, length]``."""
    make = np.random.Generator(np.random.Philox(length))
    return np.stack([slow_row(make, length, factor * PROBABILITY[overlap], overlap, force) for _ in range(ROWS)])


def drawn(length: int, overlap: bool, factor: float = 1.0, force: bool = False) -> NDArray[np.bool]:
    """The same by the library, in a batch that is wider than the utterances."""
    cfg = MaskingConfig(allow_overlap=overlap, mask_prob=factor * PROBABILITY[overlap], force_block=force)
    keys = random.split(random.key(length), ROWS)
    mask = draw_mask(keys, torch.full((ROWS,), length), length + 9, cfg, BLOCK)
    assert not mask[:, length:].any()
    return mask[:, :length].numpy()


def shares(mask: NDArray[np.bool]) -> NDArray[np.float64]:
    """Of each row, masked."""
    return mask.mean(axis=1)


def runs(mask: NDArray[np.bool]) -> NDArray[np.int64]:
    """Frames of every run of masked frames, of all rows."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    return np.flatnonzero(edges.ravel() == -1) - np.flatnonzero(edges.ravel() == 1)


def first(mask: NDArray[np.bool]) -> NDArray[np.int64]:
    """The first masked frame of each row that has one."""
    return mask[mask.any(axis=1)].argmax(axis=1)


def excess(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The samples' largest distance over the one that chance exceeds once in 10,000 times; above 1 they differ."""
    places = np.unique(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (one, other)]
    scale = math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(one) + 1 / len(other)))
    return float(np.abs(below[0] - below[1]).max()) / scale


@MODES
@LENGTHS
@pytest.mark.parametrize("measure", [shares, runs, first], ids=lambda measure: measure.__name__)
def test_masks_are_those_of_the_loop(length: int, overlap: bool, measure: Measure) -> None:
    assert excess(measure(drawn(length, overlap)), measure(slow(length, overlap))) < 1


@MODES
@pytest.mark.parametrize("length, measure", [(100, shares), (300, shares), (700, shares), (300, runs), (700, runs)])
def test_a_wrong_probability_would_be_seen(length: int, overlap: bool, measure: Measure) -> None:
    assert excess(measure(drawn(length, overlap, factor=1.2)), measure(slow(length, overlap))) > 1


@pytest.mark.parametrize("measure", [shares, first], ids=lambda measure: measure.__name__)
def test_forced_blocks_are_those_of_the_loop(measure: Measure) -> None:
    wanted = measure(slow(100, True, force=True))
    assert excess(measure(drawn(100, True, force=True)), wanted) < 1
    if measure is shares:
        assert excess(measure(drawn(100, True)), wanted) > 1
