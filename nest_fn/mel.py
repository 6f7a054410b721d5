"""Tables that follow from the preprocessor's settings: window, mel filters, fixed statistics. Built once a device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from .config.model import PreprocessorConfig
from .layers.types import Tensor

WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
    "bartlett": torch.bartlett_window,
}


def mel_filters(
    sample_rate: int, fft_length: int, features: int, lowfreq: float, highfreq: float, mel_norm: str | None = "slaney"
) -> np.ndarray:
    """Triangular filters on Slaney's mel scale: float32 ``[M, fft_length // 2 + 1]``, bit-equal to the reference's.

    The scale is linear below 1000 Hz (15 mel) and logarithmic above; ``slaney`` gives every filter the same area.
    Source: Slaney, Auditory Toolbox, 1998; spec 1.3. ``torchaudio.functional.melscale_fbanks`` differs by its float32.
    """
    linear, steps = 200.0 / 3, math.log(6.4) / 27  # Hz a mel below 1000 Hz; log-frequency a mel above
    if not 0 <= lowfreq < highfreq:
        raise ValueError(f"mel_filters: want 0 <= lowfreq < highfreq, got {lowfreq} and {highfreq} Hz.")

    def to_mel(hertz: float) -> float:
        return hertz / linear if hertz < 1000 else 15 + np.log(hertz / 1000) / steps

    mels = np.linspace(to_mel(lowfreq), to_mel(highfreq), features + 2)
    edges = np.where(mels < 15, mels * linear, 1000 * np.exp(steps * (mels - 15)))
    distance = edges[:, None] - np.arange(fft_length // 2 + 1) * sample_rate / fft_length
    width = np.diff(edges)[:, None]
    filters = np.maximum(0, np.minimum(-distance[:-2] / width[:-1], distance[2:] / width[1:])).astype(np.float32)
    if mel_norm == "slaney":  # rounded to float32 first, scaled after: so the reference's bank was made
        filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return filters


def tables(cfg: PreprocessorConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Window ``[window_length]`` and mel filters ``[M, bins]`` on the device of ``like``, in its dtype.

    The same two tensors at every call; constants of the graph when compiled.
    """
    sizes = (cfg.window_length, cfg.fft_length, cfg.sample_rate, cfg.features)
    high = cfg.highfreq if cfg.highfreq is not None else cfg.sample_rate / 2
    window, filters = _window_and_filters(cfg.window, sizes, cfg.lowfreq, high, cfg.mel_norm, like.device, like.dtype)
    return window, filters


def column(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Numbers as a constant ``[len(values), 1]`` on the device of ``like``, in its dtype."""
    made: Tensor = _column(values, like.device, like.dtype)[0]
    return made


# A graph takes these two functions' results as constants. The mark holds on plain functions only (lru_cache would be
# traced through), and results must be tuples: two lone tensors of one function collide in a graph (PyTorch 2.11).


@torch.compiler.assume_constant_result
def _window_and_filters(*settings: Any) -> tuple[Tensor, Tensor]:
    return _build_window_and_filters(*settings)


@torch.compiler.assume_constant_result
def _column(*settings: Any) -> tuple[Tensor]:
    return (_build_column(*settings),)


@functools.lru_cache(maxsize=64)
def _build_window_and_filters(
    window: str,
    sizes: tuple[int, int, int, int],
    lowfreq: float,
    highfreq: float,
    mel_norm: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    window_length, fft_length, sample_rate, features = sizes
    filters = mel_filters(sample_rate, fft_length, features, lowfreq, highfreq, mel_norm)
    # Rounded to float32 first, as the reference's, also where the audio is float64.
    return (
        _aside(lambda: WINDOWS[window](window_length, periodic=False, dtype=torch.float32).to(device, dtype)),
        _aside(lambda: torch.from_numpy(filters).to(device, dtype)),
    )


@functools.lru_cache(maxsize=64)
def _build_column(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return _aside(lambda: torch.tensor(values, dtype=dtype, device=device)[:, None])


def _aside(build: Callable[[], Tensor]) -> Tensor:
    """``build()`` in a thread of its own: grad, vmap, inference and fake-tensor modes belong to a thread, and a table
    made under one of them would carry its mark into every later call."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(build).result()
