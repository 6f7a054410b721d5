"""Long recordings as crops: consecutive parts of equal length, each of them an utterance of the manifest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .manifest_table import Manifest

_MS = 1e-3  # seconds: crops begin and end at whole milliseconds, as an utterance's id gives them


def crop_long(manifest: Manifest, longest: float) -> Manifest:
    """Utterances of more than ``longest`` seconds divided into the fewest equal crops that are not longer.

    Crops follow each other without a gap or an overlap, at the place of the utterance, so that every second is heard
    once in an epoch; they depend on nothing but the manifest and ``longest``.
    """
    count = np.where(manifest.duration > longest, np.ceil(manifest.duration / max(longest - _MS, _MS)), 1)
    count = count.astype(np.int64)
    if (count == 1).all():
        return manifest
    index = np.repeat(np.arange(len(manifest)), count)
    number = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)  # of the crop in its utterance
    crops = manifest.take(index)
    length, parts = crops.duration, count[index]
    begin = _edge(number, length, parts)
    end = np.where(number + 1 == parts, length, _edge(number + 1, length, parts))
    return replace(crops, offset=crops.offset + begin, duration=end - begin, cropped=int((count > 1).sum()))


def _edge(number: np.ndarray, length: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Seconds from the utterance's start to the start of crop ``number`` of ``parts``."""
    return np.asarray(np.round(number * length / parts, 3))
