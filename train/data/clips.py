"""Pools of clips (noise, room impulse responses): int16, held in memory up to a budget; others are read when drawn.

The rule (reference 7.3, without Q31): for an utterance of ``n`` samples draw a clip uniformly and, if it is longer than
``n``, a uniform start position. If all samples of the crop are 0, draw again; after 10 such draws the result is ``n``
zeros. A clip shorter than ``n`` is taken whole, with its own length, and repeated when it is mixed. All draws are
random words of (seed, ``noise_choice``, epoch, utterance) and depend on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nest_fn.config.training import DataConfig
from nest_fn.layers.types import Tensor
from nest_fn.train.errors import UsageError
from nest_fn.train.hash_rng import randint_below, random_words, stream_key

from .audio_files.remote import cache_of
from .corpus.manifest import load_manifest
from .corpus.manifest_table import Manifest
from .corpus.reading import read_entry
from .corpus.thread_map import ordered_map

_TRIES = 10
_GLANCE = 1024  # samples
_MIB = 1 << 20


@dataclass(frozen=True)
class ClipPool:
    """Clips of a manifest: those with ``start >= 0`` are in ``memory`` from there on, the others on disk."""

    manifest: Manifest
    config: DataConfig
    sample_rate: int  # Hz
    length: NDArray[np.int64]  # [C] samples
    start: NDArray[np.int64]  # [C] samples; -1: on disk
    memory: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.length)

    def read(self, clip: int, begin: int, count: int) -> NDArray[np.int16]:
        """Samples ``[begin, begin + count)`` of a clip, or fewer if it ends earlier. Raises ``DataError``."""
        if self.start[clip] >= 0:
            first = int(self.start[clip]) + begin
            return self.memory[first : min(first + count, int(self.start[clip] + self.length[clip]))]
        count = min(count, int(self.length[clip]) - begin)
        seconds = begin / self.sample_rate, (begin + count) / self.sample_rate
        return read_entry(self.manifest, clip, self.config, self.sample_rate, *seconds)[:count]


def load_clips(files: Sequence[str], config: DataConfig, sample_rate: int = 16000) -> ClipPool:
    """Open a pool (noise or RIRs) and fill its memory in the order of the manifests. Raises ``DataError``."""
    manifest = load_manifest(
        files,
        root=config.root,
        channel=config.channel,
        check_files=config.check_files,
        cache=cache_of(config),
        workers=config.num_workers,
    )
    length = np.maximum(np.rint(manifest.duration * sample_rate).astype(np.int64), 1)
    held = int(np.searchsorted(np.cumsum(length) * 2, config.noise_budget_mb * _MIB, side="right"))

    def whole(clip: int) -> NDArray[np.int16]:
        return read_entry(manifest, clip, config, sample_rate)

    clips = list(ordered_map(whole, range(held), workers=config.num_workers, ahead=64, name="noise pool"))
    length[:held] = [len(clip) for clip in clips]
    start = np.full(len(length), -1, np.int64)
    start[:held] = np.cumsum(length[:held]) - length[:held]
    memory = np.concatenate(clips) if clips else np.zeros(0, np.int16)
    return ClipPool(manifest, config, sample_rate, length, start, memory)


def noise_words(seed: int, epoch: int, utterance: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The random words that choose the noise of utterances ``[n]``: ``[n, tries, 2]``."""
    return random_words(stream_key(seed, "noise_choice", epoch), utterance, 2 * _TRIES).reshape(-1, _TRIES, 2)


def draw_noise(pool: ClipPool, word: NDArray[np.uint64], need: int) -> NDArray[np.int16]:
    """Noise for ``need`` samples, chosen by one utterance's words ``[tries, 2]``: int16, at most ``need`` long."""
    clips = randint_below(word[:, 0], len(pool))
    begins = randint_below(word[:, 1], np.maximum(pool.length[clips] - need, 0) + 1)
    for clip, begin in zip(clips.tolist(), begins.tolist(), strict=True):
        crop = pool.read(clip, begin, need)
        if crop[:_GLANCE].any() or crop.any():  # numpy's any looks at every sample: nearly always a glance is enough
            return crop
    return np.zeros(need, np.int16)


def load_rirs(config: DataConfig, sample_rate: int = 16000) -> Tensor | None:
    """The RIRs of ``data.rir``, float32 ``[R, L]``, zero-padded at the end; None if ``rir_prob`` is 0.

    Raises ``DataError``, and ``UsageError`` if ``rir_prob`` is above 0 and ``data.rir`` names no manifest.
    """
    if config.augment.rir_prob == 0:
        return None
    if not config.rir:
        raise UsageError(f"data.augment.rir_prob is {config.augment.rir_prob} and data.rir names no manifest; give one")
    pool = load_clips(config.rir, config, sample_rate)
    responses = [torch.from_numpy(pool.read(clip, 0, int(pool.length[clip])).copy()) for clip in range(len(pool))]
    return torch.nn.utils.rnn.pad_sequence(responses, batch_first=True).to(torch.float32) / 32768
