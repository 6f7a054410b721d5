"""Constants computed from the preprocessor's settings: window, mel filters, fixed statistics.

They are neither parameters nor state, so that neither tree contains them: ``make_tables`` computes them from the
config. ``log_mel`` calls it unless the caller passes its result, which saves 0.2 ms a call.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .config.model import PreprocessorConfig
from .layers.types import Tensor

WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "bartlett": torch.bartlett_window,
}
_CPU = torch.device("cpu")


class Tables(NamedTuple):
    """Constants of ``log_mel`` on the signal's device; float32 as in the reference, even if the audio is float64.

    ``mean`` and ``deviation``, float64 ``[M * frame_splicing, 1]``, are None unless ``normalize="fixed"``.
    """

    window: Tensor  # [window_length]
    filters: Tensor  # [M, fft_length // 2 + 1]
    mean: Tensor | None = None
    deviation: Tensor | None = None


def make_tables(cfg: PreprocessorConfig, device: torch.device | str = _CPU) -> Tables:
    """Compute the constants for these settings on the CPU, so that they are bit-identical on all devices.

    Can be traced into a graph; under ``torch.func`` transforms and in inference mode, the results are plain tensors.
    """
    high = cfg.highfreq if cfg.highfreq is not None else cfg.sample_rate / 2
    window = WINDOWS[cfg.window](cfg.window_length, periodic=False, dtype=torch.float32, device=_CPU)
    filters = mel_filters(cfg.sample_rate, cfg.fft_length, cfg.features, cfg.lowfreq, high, cfg.mel_norm)
    fixed = cfg.normalize == "fixed"
    mean, deviation = (_column(cfg.fixed_mean, device), _column(cfg.fixed_std, device)) if fixed else (None, None)
    return Tables(window.to(device, non_blocking=True), filters.to(device, non_blocking=True), mean, deviation)


def mel_filters(
    sample_rate: int, fft_length: int, features: int, lowfreq: float, highfreq: float, mel_norm: str | None = "slaney"
) -> Tensor:
    """Triangular filters on Slaney's mel scale: float32 ``[M, fft_length // 2 + 1]``, bit-equal to the reference's.

    Rates and frequencies are in Hz. The scale is linear below 1000 Hz (15 mel) and logarithmic above; ``slaney``
    normalises all filters to the same area. Source: Slaney, Auditory Toolbox, 1998; reference 1.3.
    ``torchaudio.functional.melscale_fbanks`` computes entirely in float32 and differs in the last digits. Raises
    ``ValueError`` unless ``0 <= lowfreq < highfreq``.
    """
    linear, steps = 200.0 / 3, math.log(6.4) / 27  # Hz per mel below 1000 Hz; log-frequency per mel above
    if not 0 <= lowfreq < highfreq:
        raise ValueError(f"mel_filters: want 0 <= lowfreq < highfreq, got {lowfreq} and {highfreq} Hz.")

    def to_mel(hertz: float) -> float:
        return hertz / linear if hertz < 1000 else 15 + math.log(hertz / 1000) / steps

    def count(n: int) -> Tensor:
        return torch.arange(n, dtype=torch.float64, device=_CPU)

    low, high = to_mel(lowfreq), to_mel(highfreq)
    mels = count(features + 2) * ((high - low) / (features + 1)) + low
    mels = torch.where(count(features + 2) == features + 1, high, mels)  # the last point is exact, as in numpy.linspace
    edges = torch.where(mels < 15, mels * linear, 1000 * torch.exp(steps * (mels - 15)))  # [M + 2], Hz
    distance = edges[:, None] - count(fft_length // 2 + 1) * sample_rate / fft_length
    width = edges.diff()[:, None]
    filters = torch.minimum(-distance[:-2] / width[:-1], distance[2:] / width[1:]).clamp(min=0).to(torch.float32)
    if mel_norm == "slaney":  # rounded to float32 before scaling, as in the reference
        filters = (filters * (2.0 / (edges[2:] - edges[:-2]))[:, None]).to(torch.float32)
    return filters


def _column(values: tuple[float, ...] | None, device: torch.device | str) -> Tensor:
    return torch.tensor(values or (), dtype=torch.float64, device=_CPU)[:, None].to(device, non_blocking=True)
