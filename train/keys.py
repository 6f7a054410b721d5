"""The keys of a run: all draws on the device follow from the seed through these functions.

    root(seed) ─ INIT ─────────── initial parameters, codebooks and projection
               ├ TRAIN ─ step n ─┬ mixing: noise, interfering speakers, reverberation, by utterance
               │                 └ model: dither, masks and dropout, by utterance
               └ VALID ───────────┬ mixing
                                  └ model: masks

Data loading (order, batches, choice of noise clips) draws from the same seed by ``hash_rng``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nest_fn.layers import random
from nest_fn.layers.types import Key, Tensor

INIT, TRAIN, VALID = 0, 1, 2  # streams of the root key; checkpoints and stored traces depend on these numbers


class StepKeys(NamedTuple):
    """The two keys of one step, int64 ``[2]`` each."""

    mixing: Key
    model: Key


def root_key(seed: int, device: torch.device | str | None = None) -> Key:
    """The key from which all other keys of a run are derived: int64 ``[2]``."""
    return random.key(seed, device=device)


def init_key(root: Key) -> Key:
    """The key of the initial parameters and of the frozen quantizer: ``[2] -> [2]``."""
    return random.fold_in(root, INIT)


def step_key(root: Key, step: int | Tensor) -> Key:
    """The key of the update after ``step`` earlier updates: ``[2] -> [2]``."""
    return random.fold_in(random.fold_in(root, TRAIN), step)


def validation_key(root: Key) -> Key:
    """The key of every validation pass, so that masks and noise are the same in each: ``[2] -> [2]``."""
    return random.fold_in(root, VALID)


def split_step_key(key: Key) -> StepKeys:
    """The keys of mixing and of the model, from that of a step or of a validation pass: ``[2]`` -> ``[2]`` each."""
    return StepKeys(*random.split(key, 2).unbind(0))
