"""Spectrogram, resampling and edit distance in plain PyTorch, equal to torchaudio's (``tests/nest_fn/audio``).

The last two serve where torchaudio does not load (``functions.py``): its releases ended with 2.11, PyTorch's go on. The
spectrogram is always this one: torchaudio's is the same call, which PyTorch's compiler cannot trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nest_fn.layers.types import Tensor

ZEROS = 6  # zero crossings of the sinc on each side
ROLLOFF = 0.99  # cutoff as a fraction of the lower rate's Nyquist frequency


def spectrogram(x: Tensor, window: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """Complex spectrogram without padding: ``x [B, N], window [W <= n_fft] -> [B, n_fft // 2 + 1, F]``."""
    return torch.stft(
        x, n_fft, hop_length, len(window), window, center=False, normalized=False, onesided=True, return_complex=True
    )


@dataclass(frozen=True)
class Resampler:
    """Resampling from ``source`` to ``target``, rates in Hz without a common divisor, with a windowed sinc."""

    source: int
    target: int
    kernel: Tensor  # [target, 1, taps]: one filter for each output sample of a period
    reach: int  # input samples to the left of a period that its filters cover

    def __call__(self, x: Tensor) -> Tensor:
        """Resample rows: ``[B, N] -> [B, ceil(N * target / source)]``."""
        if self.source == self.target:
            return x
        padded = F.pad(x, (self.reach, self.reach + self.source))[:, None]
        periods = F.conv1d(padded, self.kernel, stride=self.source)  # [B, target, periods]
        length = -(-x.shape[1] * self.target // self.source)
        return periods.transpose(1, 2).flatten(1)[:, :length]


def resampler(rate: int, target: int, dtype: torch.dtype = torch.float32) -> Resampler:
    """The resampler between two rates in Hz, its kernel computed in float64 and cast to ``dtype``.

    Output sample ``j`` is the sum of ``x[i] w(t) sinc(t) b / rate`` with ``t = b (i / rate - j / target)``, limited to
    ``ZEROS`` on either side, a Hann window ``w``, and ``b = ROLLOFF min(rate, target)`` (Smith, "Digital Audio
    Resampling", 2002).
    """
    divisor = math.gcd(rate, target)
    source, target = rate // divisor, target // divisor
    cutoff = ROLLOFF * min(source, target)
    reach = math.ceil(ZEROS * source / cutoff)
    inputs = torch.arange(-reach, reach + source, dtype=torch.float64) / source
    outputs = torch.arange(target, dtype=torch.float64) / target
    t = ((inputs - outputs[:, None]) * cutoff).clamp(-ZEROS, ZEROS)
    window = torch.cos(t * (math.pi / (2 * ZEROS))).square()
    kernel = torch.sinc(t) * window * (cutoff / source)
    return Resampler(source, target, kernel[:, None].to(dtype), reach)


def edit_distance(one: Sequence[object], other: Sequence[object]) -> int:
    """Fewest insertions, deletions and substitutions from one sequence to the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for count, item in enumerate(one, 1):
        diagonal, row[0] = row[0], count
        for place, wanted in enumerate(other, 1):
            replaced = diagonal + (item != wanted)
            diagonal, row[place] = row[place], min(replaced, row[place] + 1, row[place - 1] + 1)
    return row[-1]
