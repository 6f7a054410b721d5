"""Noises: white, pink, babble, mains hum, impulses and machine noise, each float32 ``[N]`` with unit power."""

from __future__ import annotations

import numpy as np

from .render import SAMPLE_RATE, render
from .voice import compose, speaker, tracks

KINDS = ("white", "pink", "babble", "hum", "impulse", "machine")
_BABBLERS = 5
_CROWD = 1_000_000  # speakers with indices from here on occur only in babble


def coloured(rng: np.random.Generator, samples: int, exponent: float) -> np.ndarray:
    """Noise whose power falls as ``f ** -exponent`` above 50 Hz: 0 white, 1 pink, 2 brown."""
    length = -(-samples // 4096) * 4096  # FFTs of sizes with large prime factors are slow
    spectrum = np.fft.rfft(rng.standard_normal(length, dtype=np.float32))
    frequency = np.fft.rfftfreq(length, 1.0 / SAMPLE_RATE)
    shape = np.maximum(frequency, 50.0) ** (-exponent / 2)
    return np.fft.irfft(spectrum * shape.astype(np.float32), length)[:samples].astype(np.float32)


def _babble(rng: np.random.Generator, samples: int) -> np.ndarray:
    mixture = np.zeros(samples, dtype=np.float32)
    for _ in range(_BABBLERS):
        who = speaker(0, _CROWD + int(rng.integers(1 << 40)))
        score = compose(rng, who, samples / SAMPLE_RATE + 1.0)
        voice = np.resize(render(rng, who, tracks(rng, who, score)), samples)
        mixture += np.roll(voice, int(rng.integers(samples)))  # so that they do not all start at the same time
    return mixture


def _hum(rng: np.random.Generator, samples: int) -> np.ndarray:
    time = np.arange(samples) / SAMPLE_RATE
    mains = 50.0 if rng.random() < 0.5 else 60.0
    wave = 0.05 * coloured(rng, samples, 1.0)
    for harmonic in range(1, 25):
        level = rng.lognormal(0.0, 0.7) / harmonic
        wave += (level * np.sin(2 * np.pi * (mains * harmonic * time + rng.random()))).astype(np.float32)
    return wave


def _impulse(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Knocks and clatter: decaying resonances at random times."""
    wave = 0.01 * coloured(rng, samples, 1.0)
    for start in np.flatnonzero(rng.random(samples) < 3.0 / SAMPLE_RATE):
        length = min(int(rng.integers(300, 3000)), samples - int(start))
        time = np.arange(length) / SAMPLE_RATE
        decay = np.exp(-time / rng.uniform(0.003, 0.04)) * rng.lognormal(0.0, 0.6)
        tone = np.sin(2 * np.pi * rng.uniform(300.0, 5000.0) * time) + 0.7 * rng.standard_normal(length)
        wave[start : start + length] += (decay * tone).astype(np.float32)
    return wave


def _machine(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Coloured noise with a periodic level."""
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * (rng.uniform(0.3, 4.0) * np.arange(samples) / SAMPLE_RATE + rng.random()))
    return coloured(rng, samples, rng.uniform(0.5, 1.6)) * swell.astype(np.float32)


def noise(rng: np.random.Generator, kind: str, samples: int) -> np.ndarray:
    """``samples`` samples of a kind of noise, with unit power. Raises ``ValueError`` for an unknown kind."""
    makers = {"babble": _babble, "hum": _hum, "impulse": _impulse, "machine": _machine}
    if kind not in KINDS:
        raise ValueError(f"noise: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    wave = makers[kind](rng, samples) if kind in makers else coloured(rng, samples, 1.0 if kind == "pink" else 0.0)
    return wave / max(float(np.sqrt(np.mean(wave**2))), 1e-6)
