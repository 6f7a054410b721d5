"""What a benchmark runs: a configuration and batches of noise at the level of speech."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.types import Tensor

_LEVEL = 2000.0  # of 32768


class Shape(NamedTuple):
    """Rows and seconds of a batch."""

    rows: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.rows} x {self.seconds:g} s"

    @property
    def audio(self) -> float:
        """Seconds of audio."""
        return self.rows * self.seconds


class Case(NamedTuple):
    """A preset with overrides, and the shape of its batches."""

    preset: str
    shape: Shape
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.preset, *self.overrides, str(self.shape)))

    def config(self) -> Config:
        """The configuration."""
        return Config.preset(self.preset, list(self.overrides))


def made_up_batch(cfg: Config, shape: Shape, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A raw batch without padding: ``audio`` and ``noise`` int16 ``[B, N]`` and the rest that a step takes.

    Silence would not do: numbers below the normal range of float32 are slow on a CPU.
    """
    samples = round(shape.seconds * cfg.sample_rate)
    draw = random.normal(random.key(7), (2, shape.rows, samples)) * _LEVEL
    length = torch.full((shape.rows,), samples)
    batch = {
        "audio": draw[0].to(torch.int16), "audio_len": length, "noise": draw[1].to(torch.int16), "noise_len": length,
        "row": torch.arange(shape.rows), "utterance": torch.arange(shape.rows) + 1, "weight": torch.ones(shape.rows),
    }  # fmt: skip
    return {name: value.to(device) for name, value in batch.items()}
