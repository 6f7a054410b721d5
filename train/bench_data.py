"""How much audio the loader makes of one core's time, and what an epoch's plan wastes."""

from __future__ import annotations

import time
from itertools import islice
from typing import NamedTuple

from .data import Dataset, batches


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
