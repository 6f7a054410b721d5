"""Waveform to normalised log-mel, on the device: pre-emphasis, STFT, mel filters, logarithm, normalisation.

Everything is differentiable with respect to the audio, runs in float32 or float64 (also under autocast), and never
synchronises with the device. See reference 1; its quirks are Q1 to Q8.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F

from .arguments import check_preprocessor, check_tensor
from .audio.plain import spectrogram
from .config.model import PreprocessorConfig
from .layers import random
from .layers.lengths import check_lengths, valid_mask
from .layers.types import Key, Tensor
from .mel import WINDOWS, Tables, make_tables

NORMALIZE = ("per_feature", "all_features", "fixed", None)
STD_EPSILON = 1e-5  # added to a standard deviation, in log-mel units


def log_mel(
    audio: Tensor, audio_len: Tensor, cfg: PreprocessorConfig, *,
    key: Key | None = None, train: bool = False, tables: Tables | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Normalised log-mel: ``audio [B, N], audio_len [B] (samples) -> features [B, M, F], lengths [B] (frames)``.

    ``audio`` is float in [-1, 1] or int16 (scaled by 2^-15); float64 is kept, all other dtypes become float32.
    Lengths are clamped to ``N``. Padded frames are set to ``cfg.pad_value``; ``F`` is a multiple of ``cfg.pad_to``.
    ``train=True`` adds dither and narrow-band augmentation drawn from ``key``, int64 ``[2]`` or ``[B, 2]``.
    ``tables`` are ``make_tables(cfg, audio.device)``, for callers that compute them once.

    As in the reference, only pre-emphasis sets the samples beyond ``audio_len`` to 0: with ``preemph=None`` or
    ``compat="legacy"`` nonzero samples there affect the last frames. ``compat="legacy"`` also gives NaN for an
    utterance of one frame (reference 0, 1.3).

    Raises ``ValueError`` or ``TypeError`` for wrong shapes, dtypes and settings, and for a missing ``key``.
    """
    check_preprocessor("log_mel", cfg)
    check_tensor("log_mel: audio", audio)
    _check_config(cfg)
    x = _as_float(audio)
    check_lengths("log_mel", audio, audio_len)
    lengths = audio_len.to(torch.int64).clamp(min=0, max=audio.shape[1])
    tables = make_tables(cfg, x.device) if tables is None else tables
    dither_key, narrow_key = _augmentation_keys(cfg, key, train, audio.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        x = _pre_emphasis(_dither(_exact_padding(x, cfg), cfg, dither_key), lengths, cfg)
        power = _narrow_band(_power_spectrum(x, tables.window.to(x.dtype), cfg), cfg, narrow_key)
        features = _log(tables.filters.to(x.dtype) @ power, cfg)
        features = features.repeat(1, cfg.frame_splicing, 1)  # Q7: copies of one frame, not neighbours
        feature_len = frames(lengths, cfg)
        features = normalize(features, feature_len, cfg, tables)
        return _pad(features, feature_len, cfg), feature_len


@overload
def frames(audio_len: int, cfg: PreprocessorConfig) -> int: ...
@overload
def frames(audio_len: Tensor, cfg: PreprocessorConfig) -> Tensor: ...
def frames(audio_len: int | Tensor, cfg: PreprocessorConfig) -> int | Tensor:
    """Number of valid frames for ``audio_len`` samples, an int or int64 ``[...]``; 0 for 0 samples (reference 1.3)."""
    side = (cfg.fft_length - cfg.hop_length) // 2 if cfg.exact_pad else cfg.fft_length // 2
    # The centred STFT gives one frame more, which the reference drops; under exact_pad it drops a valid one (Q8).
    extra = 1 if cfg.compat == "legacy" else 0
    count = (audio_len + (2 * side - cfg.fft_length)) // cfg.hop_length + extra
    if isinstance(count, Tensor):
        return torch.where(torch.as_tensor(audio_len) > 0, count, 0).clamp(min=0)
    return max(count, 0) if audio_len > 0 else 0


def normalize(features: Tensor, lengths: Tensor, cfg: PreprocessorConfig, tables: Tables) -> Tensor:
    """Normalise rows to mean 0, deviation 1 over valid frames: ``[B, M, F], [B] -> [B, M, F]`` (reference 1.4)."""
    if cfg.normalize is None:
        return features
    if tables.mean is not None and tables.deviation is not None:  # Q5: one pair for each mel bin, for any batch size
        return (features - tables.mean.to(features.dtype)) / tables.deviation.to(features.dtype)
    axes = (2,) if cfg.normalize == "per_feature" else (1, 2)
    valid = valid_mask(lengths, features.shape[2])[:, None, :]
    number = lengths.to(features.dtype)[:, None, None] * (features.shape[1] if len(axes) == 2 else 1)
    mean = torch.where(valid, features, 0.0).sum(axes, keepdim=True) / number.clamp(min=1.0)
    centred = features - mean
    # Q4: a single frame has deviation 0 and becomes 0; legacy divides 0 by 0.
    freedom = number - 1.0 if cfg.compat == "legacy" else (number - 1.0).clamp(min=1.0)
    variance = torch.where(valid, centred, 0.0).square().sum(axes, keepdim=True) / freedom
    return centred / (_safe_sqrt(variance) + STD_EPSILON)


def _safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinity."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def _as_float(audio: Tensor) -> Tensor:
    if audio.ndim != 2:
        raise ValueError(f"log_mel: audio wants [B, N], got {list(audio.shape)}; add a batch axis or average channels.")
    if audio.dtype == torch.int16:
        return audio.to(torch.float32) * 2.0**-15
    if not audio.is_floating_point():
        raise TypeError(f"log_mel: audio wants float or int16 samples, got {audio.dtype}; scale it to [-1, 1].")
    return audio if audio.dtype == torch.float64 else audio.to(torch.float32)


def _augmentation_keys(
    cfg: PreprocessorConfig, key: Key | None, train: bool, rows: int
) -> tuple[Key | None, Key | None]:
    """Keys ``[B, 2]`` for dither and for narrow-band augmentation; None if the augmentation is off."""
    dither, narrow = cfg.dither > 0, cfg.nb_augmentation_prob > 0 and cfg.nb_max_freq < cfg.sample_rate / 2
    if not train or not (dither or narrow):
        return None, None
    if key is None:
        raise ValueError(
            f"log_mel: train=True with dither {cfg.dither} and nb_augmentation_prob {cfg.nb_augmentation_prob} needs "
            f"key=; pass one, or train=False."
        )
    random.check_key(key, "log_mel: key")
    by_row = random.split(key, rows) if key.ndim == 1 else key
    keys = random.split(by_row, 2)
    return keys[0] if dither else None, keys[1] if narrow else None


def _exact_padding(x: Tensor, cfg: PreprocessorConfig) -> Tensor:
    """Under ``exact_pad``, pad the signal with zeros first, so that all later steps treat them as samples (Q8)."""
    if not cfg.exact_pad:
        return x
    side = (cfg.fft_length - cfg.hop_length) // 2
    return F.pad(x, (side, side), mode=_padding_mode(x, side, cfg))


def _padding_mode(x: Tensor, side: int, cfg: PreprocessorConfig) -> str:
    if cfg.compat != "legacy":
        return "constant"
    if x.shape[1] <= side:
        raise ValueError(
            f"log_mel: compat='legacy' reflects {side} samples at each end, audio has {x.shape[1]}; "
            f"pad it to at least {side + 1} samples, or use compat='current'."
        )
    return "reflect"


def _dither(x: Tensor, cfg: PreprocessorConfig, key: Key | None) -> Tensor:
    """Add white noise to all samples, padding included; the input is not modified (Q3)."""
    return x if key is None else x + cfg.dither * random.normal(key, x.shape, x.dtype)


def _pre_emphasis(x: Tensor, lengths: Tensor, cfg: PreprocessorConfig) -> Tensor:
    """``y[i] = x[i] - preemph x[i-1]``, and 0 beyond the length (under exact_pad, of the padded signal: Q8)."""
    if cfg.preemph is None:
        return x
    y = x - cfg.preemph * F.pad(x[:, :-1], (1, 0))
    return y if cfg.compat == "legacy" else torch.where(valid_mask(lengths, y.shape[1]), y, 0.0)


def _power_spectrum(x: Tensor, window: Tensor, cfg: PreprocessorConfig) -> Tensor:
    """STFT magnitude to the power ``mag_power``: ``[B, N] -> [B, fft_length // 2 + 1, F]``."""
    if not cfg.exact_pad:
        side = cfg.fft_length // 2
        x = F.pad(x, (side, side), mode=_padding_mode(x, side, cfg))
    if x.shape[1] < cfg.fft_length:
        raise ValueError(
            f"log_mel: {x.shape[1]} padded samples do not fill one transform of {cfg.fft_length}; pad audio."
        )
    spectrum = spectrogram(x, window, cfg.fft_length, cfg.hop_length)
    # Sum of squares instead of abs().pow(): faster, and differentiable where the spectrum is 0.
    power = spectrum.real.square() + spectrum.imag.square()
    if cfg.mag_power == 2.0:
        return power
    magnitude = _safe_sqrt(power)
    return magnitude if cfg.mag_power == 1.0 else magnitude.pow(cfg.mag_power)


def _narrow_band(power: Tensor, cfg: PreprocessorConfig, key: Key | None) -> Tensor:
    """Set all bins from ``nb_max_freq`` Hz on to 0 in randomly chosen rows."""
    if key is None:
        return power
    chosen = random.bernoulli(key, cfg.nb_augmentation_prob, (power.shape[0],))
    first = int(cfg.nb_max_freq / cfg.sample_rate * cfg.fft_length)
    high = torch.arange(power.shape[1], device=power.device) >= first
    return torch.where(chosen[:, None, None] & high[:, None], 0.0, power)


def _log(mel: Tensor, cfg: PreprocessorConfig) -> Tensor:
    if not cfg.log:
        return mel
    guard = cfg.log_zero_guard_value
    if isinstance(guard, str):
        guard = float(getattr(torch.finfo(torch.float32), guard))
    return torch.log(mel + guard) if cfg.log_zero_guard_type == "add" else torch.log(mel.clamp(min=guard))


def _pad(features: Tensor, lengths: Tensor, cfg: PreprocessorConfig) -> Tensor:
    """Set padded frames to ``pad_value`` and pad the width to a multiple of ``pad_to`` frames."""
    width = features.shape[2]
    features = torch.where(valid_mask(lengths, width)[:, None, :], features, cfg.pad_value)
    missing = -width % cfg.pad_to if cfg.pad_to > 0 else 0
    return F.pad(features, (0, missing), value=cfg.pad_value) if missing else features


def _check_config(cfg: PreprocessorConfig) -> None:
    if cfg.window not in WINDOWS:  # Q1
        raise ValueError(f"log_mel: unknown window {cfg.window!r}; choose one of {', '.join(WINDOWS)}.")
    if cfg.normalize not in NORMALIZE:
        raise ValueError(f"log_mel: unknown normalize {cfg.normalize!r}; choose one of {NORMALIZE}.")
    if cfg.mel_norm not in ("slaney", None):
        raise ValueError(f"log_mel: unknown mel_norm {cfg.mel_norm!r}; choose 'slaney' or None.")
    if cfg.log_zero_guard_type not in ("add", "clamp"):
        raise ValueError(f"log_mel: unknown log_zero_guard_type {cfg.log_zero_guard_type!r}; choose 'add' or 'clamp'.")
    if isinstance(cfg.log_zero_guard_value, str) and cfg.log_zero_guard_value not in ("tiny", "eps"):
        raise ValueError(f"log_mel: log_zero_guard_value {cfg.log_zero_guard_value!r}; pass a number, 'tiny' or 'eps'.")
    if not 0 < cfg.window_length <= cfg.fft_length:
        raise ValueError(f"log_mel: a window of {cfg.window_length} samples does not fit n_fft {cfg.fft_length}.")
    if cfg.exact_pad and cfg.hop_length % 2:
        raise ValueError(f"log_mel: exact_pad wants an even hop, got {cfg.hop_length} samples.")
    if cfg.normalize == "fixed":
        for name, values in (("fixed_mean", cfg.fixed_mean), ("fixed_std", cfg.fixed_std)):
            if values is None or len(values) != cfg.features * cfg.frame_splicing:
                got = "none" if values is None else len(values)
                raise ValueError(f"log_mel: normalize='fixed' wants {cfg.features} numbers in {name}, got {got}.")
