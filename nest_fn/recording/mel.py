"""Log-mel of a recording of any length in blocks of frames, equal to that of the whole.

A block is computed with some frames more at both ends, which are dropped, and normalised with the statistics of the
whole recording, which a first pass over all blocks collects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from nest_fn.config.model import PreprocessorConfig
from nest_fn.frontend import STD_EPSILON, frames, log_mel, normalize
from nest_fn.layers.types import Tensor
from nest_fn.mel import make_tables

Read = Callable[[int, int], Tensor]
"""``read(first, count)``: samples ``[first, first + count)`` of a recording, int16 or float ``[count]``."""


class Statistics(NamedTuple):
    """Mean and deviation of every mel bin over a recording, float64 ``[M, 1]``; None where there are none to apply."""

    mean: Tensor | None
    deviation: Tensor | None


def mel_frames(read: Read, samples: int, first: int, last: int, cfg: PreprocessorConfig) -> Tensor:
    """Frames ``[first, last)`` of a recording of so many samples, before normalisation: ``[1, M, last - first]``."""
    plain = replace(cfg, normalize=None, pad_to=0, fixed_mean=None, fixed_std=None)
    more = -(-cfg.fft_length // cfg.hop_length) + 1
    begin = max(0, first - more)
    start = begin * cfg.hop_length
    stop = samples if last + more >= frames(samples, cfg) else (last + more) * cfg.hop_length
    audio = read(start, stop - start)[None]
    mel, _ = log_mel(audio, torch.tensor([audio.shape[1]], device=audio.device), plain)
    return mel[:, :, first - begin : last - begin]


def recording_statistics(read: Read, samples: int, cfg: PreprocessorConfig, block: int) -> Statistics:
    """What ``normalize`` would compute of the whole recording, from blocks of ``block`` frames (reference 1.4)."""
    if cfg.normalize not in ("per_feature", "all_features"):
        return Statistics(None, None)
    axes = (2,) if cfg.normalize == "per_feature" else (1, 2)
    count, origin, total, squares = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for mel in _blocks(read, samples, cfg, block):
        if not count:  # sums of differences from the first frame lose no digits
            origin = mel[:, :, :1].double().mean(axes, keepdim=True)
        away, count = mel.double() - origin, count + mel.shape[2]
        total = total + away.sum(axes, keepdim=True)
        squares = squares + away.square().sum(axes, keepdim=True)
    number = count * (cfg.features * cfg.frame_splicing if len(axes) == 2 else 1)
    freedom = number - 1 if cfg.compat == "legacy" else max(number - 1, 1)
    variance = ((squares - total * total / number) / freedom).clamp(min=0)
    return Statistics(origin + total / number, variance.sqrt())


def normalized(mel: Tensor, statistics: Statistics, cfg: PreprocessorConfig) -> Tensor:
    """A block ``[1, M, F]`` normalised with the statistics of its recording."""
    if statistics.mean is None or statistics.deviation is None:
        lengths = torch.tensor([mel.shape[2]], device=mel.device)
        return normalize(mel, lengths, cfg, make_tables(cfg, mel.device))
    mean, deviation = statistics.mean.to(mel.dtype), statistics.deviation.to(mel.dtype)
    return (mel - mean) / (deviation + STD_EPSILON)


def _blocks(read: Read, samples: int, cfg: PreprocessorConfig, block: int) -> Iterator[Tensor]:
    total = frames(samples, cfg)
    for first in range(0, total, block):
        yield mel_frames(read, samples, first, min(first + block, total), cfg)
