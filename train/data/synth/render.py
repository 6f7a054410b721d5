"""Source-filter synthesis: pulses and noise through time-varying resonances, in the short-time Fourier domain.

The sources are generated at the sample rate. Every 8 ms the spectrum of a 16 ms Hann window is multiplied by the
response of the vocal tract at that time, and the results are overlap-added (the windows sum to one). The FFT is twice
as long as the window, which leaves 16 ms for the ringing of the resonances.
"""

from __future__ import annotations

import numpy as np

from .voice import Speaker, Tracks

SAMPLE_RATE = 16000  # Hz
_PER_MS = SAMPLE_RATE // 1000
_HOP, _WINDOW, _FFT = 128, 256, 512  # samples
_HOP_MS = _HOP // _PER_MS
_BINS = _FFT // 2 + 1
_BANDWIDTHS = np.array([70.0, 100.0, 150.0])  # Hz, of the first three formants
_UPPER = np.array([[3500.0, 250.0], [4500.0, 350.0], [5500.0, 450.0], [6500.0, 550.0], [7500.0, 650.0]])  # Hz, width
_DELAYS = np.exp(-2j * np.pi * np.outer(np.arange(8), np.arange(_BINS)) / _FFT).astype(np.complex64)  # z^-k at each bin
_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)).astype(np.float32)


def _resonators(centres: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Denominator of a cascade of two-pole resonators: centres, widths ``[T, R]`` Hz -> coefficients ``[T, 2R+1]``."""
    radius = np.exp(-np.pi * widths / SAMPLE_RATE)
    angle = 2 * np.pi * np.minimum(centres, 0.49 * SAMPLE_RATE) / SAMPLE_RATE
    product = np.ones((len(centres), 1))
    for r in range(centres.shape[1]):
        first, second = -2 * radius[:, r] * np.cos(angle[:, r]), radius[:, r] ** 2
        longer = np.pad(product, ((0, 0), (0, 2)))
        longer[:, 1:-1] += first[:, None] * product
        longer[:, 2:] += second[:, None] * product
        product = longer
    return product


def _response(coefficients: np.ndarray) -> np.ndarray:
    """A polynomial in z^-1 on the unit circle: ``[T, k] -> [T, bins]`` complex."""
    real = coefficients.astype(np.float32)
    delays = _DELAYS[: real.shape[1]]
    out = np.empty((len(real), _BINS), dtype=np.complex64)
    # einsum, not @: a threaded matrix product may sum in another order, and the bytes must be reproducible.
    out.real, out.imag = np.einsum("tk,kb->tb", real, delays.real), np.einsum("tk,kb->tb", real, delays.imag)
    return out


def _unit_power(response: np.ndarray) -> np.ndarray:
    """Scale a response so that white noise keeps its power: a phone's loudness then follows from its levels alone."""
    power = np.mean(response.real**2 + response.imag**2, axis=1, keepdims=True)
    return np.asarray(response / np.sqrt(power))


def tract_response(who: Speaker, formants: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """Response of glottal source and vocal tract: formants ``[T, 3]`` Hz, damping ``[T]`` -> ``[T, bins]`` complex."""
    moving = _response(_resonators(formants, _BANDWIDTHS * damping[:, None]))
    fixed = _response(np.array([[1.0, -who.tilt]]))
    for centre, width in _UPPER:
        if centre * who.tract < 0.47 * SAMPLE_RATE:
            fixed = fixed * _response(_resonators(np.array([[centre * who.tract]]), np.array([[width]])))
    return _unit_power(1.0 / (moving * fixed))


def _hiss_response(centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Response of a constriction: one resonance and a zero near 0 Hz, ``[T]`` Hz each -> ``[T, bins]`` complex."""
    poles = _response(_resonators(centre[:, None], width[:, None]))
    return _unit_power(_response(np.array([[1.0, -0.95]])) / poles)


def _to_samples(track: np.ndarray) -> np.ndarray:
    """Interpolate a control signal ``[ms]`` linearly to every sample: ``[ms * 16]`` float32."""
    held = np.append(track, track[-1]).astype(np.float32)
    slope = np.arange(_PER_MS, dtype=np.float32) / _PER_MS
    return (held[:-1, None] + (held[1:] - held[:-1])[:, None] * slope).ravel()


def _pulses(rng: np.random.Generator, f0: np.ndarray, jitter: float) -> np.ndarray:
    """Glottal pulses of unit power at pitch ``f0 [ms]``: ``[ms * 16]``; each is split over the two nearest samples."""
    wobble = jitter * rng.standard_normal(len(f0)) * 2.5
    phase = np.cumsum(_to_samples(f0 * (1.0 + wobble)).astype(np.float64)) / SAMPLE_RATE
    turns = np.floor(phase)
    at = np.flatnonzero(np.diff(turns) > 0)
    late = (turns[at + 1] - phase[at]) / (phase[at + 1] - phase[at])  # position of the pulse between the two samples
    size = np.sqrt(SAMPLE_RATE / f0[at // _PER_MS]) * (1.0 + 0.05 * rng.standard_normal(len(at)))
    train = np.zeros(len(phase), dtype=np.float32)
    train[at] += size * (1.0 - late)
    train[at + 1] += size * late
    return train


def _spectra(signal: np.ndarray) -> np.ndarray:
    """Windowed spectra around every multiple of the hop: ``[N] -> [N // hop + 1, bins]`` complex."""
    padded = np.pad(signal, (_HOP, _HOP + _WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][: len(signal) // _HOP + 1]
    return np.fft.rfft(frames * _HANN, _FFT, axis=1)


def _overlap_add(spectra: np.ndarray, length: int) -> np.ndarray:
    """The signal with these windowed spectra: ``[T, bins] -> [length]``."""
    pieces = np.fft.irfft(spectra, _FFT, axis=1).astype(np.float32).reshape(len(spectra), _FFT // _HOP, _HOP)
    out = np.zeros((len(spectra) + _FFT // _HOP, _HOP), dtype=np.float32)
    for k in range(_FFT // _HOP):
        out[k : k + len(spectra)] += pieces[:, k]
    return out.ravel()[_HOP : _HOP + length]


def render(rng: np.random.Generator, who: Speaker, control: Tracks) -> np.ndarray:
    """Synthesise the audio of control signals: float32 ``[ms * 16]``, with vowels near unit power."""
    length = len(control.f0) * _PER_MS
    noise = rng.standard_normal((2, length), dtype=np.float32)
    pulses = _pulses(rng, control.f0, who.jitter)
    throat = pulses * _to_samples(control.voice) + noise[0] * _to_samples(control.breath)
    hiss = noise[1] * _to_samples(control.hiss)
    at = np.minimum(np.arange(length // _HOP + 1) * _HOP_MS, len(control.f0) - 1)
    spectra = _spectra(throat) * tract_response(who, control.formants[at], control.damping[at])
    spectra += _spectra(hiss) * _hiss_response(control.hiss_centre[at], control.hiss_width[at])
    return _overlap_add(spectra, length)
