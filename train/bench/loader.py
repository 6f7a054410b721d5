"""How much audio the loader prepares a core-second, and what it costs beside the steps that it feeds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nest_fn.config import Config
from nest_fn.config.training import DataConfig
from nest_fn.extras import has_extra
from nest_fn.layers import random
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.manifest import write_manifest
from nest_fn.train.data.dataset import Dataset, RawBatch, batches, open_dataset
from nest_fn.train.data.synth.corpus import CorpusSpec, write_corpus
from nest_fn.train.hash_rng import random_words, stream_key, uniform
from nest_fn.train.run.batch import prepare_batch
from nest_fn.train.run.device import keep_freed_memory
from nest_fn.train.step.step import init_train_state, make_step

from .rates import wait
from .sides import Machine

_RATE = 16000  # Hz
_CLIP = 12  # seconds
_BATCHES = 8  # of each turn
_FORMATS = {"flac": {}, "opus": {"format": "OGG", "subtype": "OPUS"}}  # as soundfile names them
_SMALL = CorpusSpec(
    train_minutes=8.0, valid_minutes=0.2, noise_minutes=0.5, probe_train_minutes=0.2, probe_test_minutes=0.2
)


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

    Keys: ``wav``, ``wav_noise``, and where soundfile can be used ``flac`` and ``opus``, also with noise. The clips are
    low-passed noise whose level changes like that of speech; the noise is WAV.
    """
    noise = _write_clips(folder, "noise", 12, "wav")
    rates: dict[str, float] = {}
    for kind in ("wav", *_FORMATS) if has_extra("soundfile") else ("wav",):
        clean = _write_clips(folder, "clean", max(1, round(minutes * 60 / _CLIP)), kind)
        for name, noises in ((kind, ()), (f"{kind}_noise", (noise,))):
            dataset = open_dataset(DataConfig(train=(clean,), noise=noises, num_workers=1), seed=0)
            count = len(dataset.plan(0))
            rates[name] = max(loader_throughput(dataset, count).per_core_second for _ in range(repeats))
    return rates


def _write_clips(folder: Path, name: str, count: int, kind: str) -> str:
    """Clips and their manifest; the manifest's path."""
    entries = []
    for number in range(count):
        path = folder / f"{name}{number}.{kind}"
        if kind == "wav":
            write_wav(path, _clip(name, number))
        else:
            import soundfile

            soundfile.write(path, _clip(name, number), _RATE, **_FORMATS[kind])
        entries.append({"audio_filepath": path.name, "duration": float(_CLIP)})
    manifest = folder / f"{name}_{kind}.jsonl"
    write_manifest(manifest, entries)
    return str(manifest)


def _clip(name: str, number: int) -> NDArray[np.int16]:
    """Low-passed noise under an envelope of four syllables a second."""
    white = uniform(random_words(stream_key(number, f"bench {name}", 0), np.arange(_CLIP * _RATE), 1)[:, 0]) - 0.5
    low = np.convolve(white, np.hanning(16), mode="same")
    envelope = 0.02 + np.sin(2 * np.pi * np.arange(len(low)) / _RATE) ** 2 * 0.3
    return np.asarray((low / np.abs(low).max() * envelope * 32767).astype(np.int16))


def files_beside_tensors(preset: str, machine: Machine, rounds: int) -> dict[str, float]:
    """Least wall-clock seconds of the same steps, from WAV files and from batches in memory, taking turns."""
    torch.set_num_threads(machine.threads)
    keep_freed_memory()
    device = torch.device(machine.device)
    with tempfile.TemporaryDirectory(prefix="nest_fn_bench_") as home:
        manifests = write_corpus(Path(home) / "corpus", _SMALL)
        overrides = [f"data.train={manifests['train']}", f"data.noise={manifests['noise']}", "data.batch_seconds=40"]
        cfg = Config.preset(preset, overrides)
        dataset = open_dataset(cfg.data, cfg.trainer.seed, sample_rate=cfg.sample_rate)
        ready = list(islice(batches(dataset, epoch=0), _BATCHES))
        train = _trainer(cfg, device)
        train(ready)
        turns = [(train(islice(batches(dataset, epoch=0), _BATCHES)), train(ready)) for _ in range(rounds)]
    files, tensors = map(min, zip(*turns, strict=True))
    audio = sum(int(raw["audio_len"].sum()) for raw in ready) / cfg.sample_rate
    return {"files": files, "tensors": tensors, "audio_seconds": audio}


def _trainer(cfg: Config, device: torch.device) -> Callable[[Iterable[RawBatch]], float]:
    """A function that trains on batches, from the same state each time, and gives its wall-clock seconds."""
    key = random.key(0, device=device)
    begin = init_train_state(key, cfg)
    step = make_step(cfg)

    def train(source: Iterable[RawBatch]) -> float:
        ts = begin
        wait(device)
        begun = time.perf_counter()
        for raw in source:
            ts, _ = step(
                ts, prepare_batch(raw, cfg, random.fold_in(key, ts.step), device), random.fold_in(key, ts.step)
            )
        wait(device)
        return time.perf_counter() - begun

    return train


def end_to_end_told(found: dict[str, float]) -> Iterator[str]:
    """Lines of a report."""
    rate, times = found["audio_seconds"] / found["files"], found["files"] / found["tensors"]
    yield f"from files {rate:,.0f} audio-s/s, {times:.3f} times as long as from batches in memory"
