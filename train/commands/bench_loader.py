"""How much audio the loader prepares per core-second."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nest_fn.config.training import DataConfig
from nest_fn.extras import has_extra
from nest_fn.train.data.corpus.manifest import write_manifest
from nest_fn.train.data.corpus.wav import write_wav
from nest_fn.train.data.dataset import Dataset, batches, open_dataset
from nest_fn.train.hash_rng import random_words, stream_key, uniform

_RATE = 16000  # Hz
_CLIP = 12  # seconds


class Throughput(NamedTuple):
    """What a run of the loader took; audio is counted without padding."""

    audio_seconds: float
    core_seconds: float  # of all threads
    wall_seconds: float
    first_batch_seconds: float  # wall clock

    @property
    def per_core_second(self) -> float:
        """Audio-seconds for one core-second."""
        return self.audio_seconds / self.core_seconds

    @property
    def per_second(self) -> float:
        """Audio-seconds for one second on the clock."""
        return self.audio_seconds / self.wall_seconds


def loader_throughput(dataset: Dataset, count: int, *, epoch: int = 0) -> Throughput:
    """Make ``count`` batches (decoding, noise, collating) and measure; the noise pool is already loaded."""
    wall, core = time.perf_counter(), time.process_time()
    samples, first = 0, 0.0
    for raw in islice(batches(dataset, epoch=epoch), count):
        first = first or time.perf_counter() - wall
        samples += int(raw["audio_len"].sum())
    core, wall = time.process_time() - core, time.perf_counter() - wall
    return Throughput(samples / dataset.sample_rate, core, wall, first)


def loader_rates(folder: Path, minutes: float = 4.0, repeats: int = 3) -> dict[str, float]:
    """Audio-seconds a core-second of one worker, best of ``repeats``, over made-up clips written to ``folder``.

    Keys: ``wav``, ``wav_noise``, and ``flac``, ``flac_noise`` where soundfile can be used. The clips are low-passed
    noise whose level changes like that of speech.
    """
    noise = _write_clips(folder, "noise", 12, ".wav")
    rates: dict[str, float] = {}
    for suffix in (".wav", ".flac") if has_extra("soundfile") else (".wav",):
        clean = _write_clips(folder, "clean", max(1, round(minutes * 60 / _CLIP)), suffix)
        for name, noises in ((suffix[1:], ()), (f"{suffix[1:]}_noise", (noise,))):
            dataset = open_dataset(DataConfig(train=(clean,), noise=noises, num_workers=1), seed=0)
            count = len(dataset.plan(0))
            rates[name] = max(loader_throughput(dataset, count).per_core_second for _ in range(repeats))
    return rates


def _write_clips(folder: Path, name: str, count: int, suffix: str) -> str:
    """Clips and their manifest; the manifest's path."""
    entries = []
    for number in range(count):
        path = folder / f"{name}{number}{suffix}"
        if suffix == ".wav":
            write_wav(path, _clip(name, number))
        else:
            import soundfile

            soundfile.write(path, _clip(name, number), _RATE)
        entries.append({"audio_filepath": path.name, "duration": float(_CLIP)})
    manifest = folder / f"{name}{suffix}.jsonl"
    write_manifest(manifest, entries)
    return str(manifest)


def _clip(name: str, number: int) -> NDArray[np.int16]:
    """Low-passed noise under an envelope of four syllables a second."""
    white = uniform(random_words(stream_key(number, f"bench {name}", 0), np.arange(_CLIP * _RATE), 1)[:, 0]) - 0.5
    low = np.convolve(white, np.hanning(16), mode="same")
    envelope = 0.02 + np.sin(2 * np.pi * np.arange(len(low)) / _RATE) ** 2 * 0.3
    return np.asarray((low / np.abs(low).max() * envelope * 32767).astype(np.int16))
