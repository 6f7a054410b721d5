"""Reads utterances of a manifest: one function, so that all commands judge the same line in the same way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nest_fn.config.training import DataConfig

from ..audio_files.audio import Channel, read_audio
from .manifest_table import Manifest


def read_entry(
    manifest: Manifest, index: int, config: DataConfig, sample_rate: int, begin: float = 0.0, end: float | None = None
) -> NDArray[np.int16]:
    """Seconds ``[begin, end)`` of an utterance, by default all of it: int16 ``[n]`` at ``sample_rate`` Hz.

    The file may end too early by ``data.duration_tolerance``; where that is not set, by what a manifest rounds away:
    half a unit of the last decimal of the line's numbers. Raises ``DataError``.
    """
    end = float(manifest.duration[index]) if end is None else end
    return read_audio(
        manifest.source(index), float(manifest.offset[index]) + begin, end - begin, sample_rate=sample_rate,
        channel=channel_of(manifest, index, config.channel), resample=config.resample,
        tolerance=config.duration_tolerance, rounding=float(manifest.rounding[index]),
        where=manifest.where(index),
    )  # fmt: skip


def channel_of(manifest: Manifest, index: int, default: Channel) -> Channel:
    """The channels that an utterance's line names, else the default."""
    return manifest.channels[manifest.channel[index]] or default
