"""How predictions, features and target tokens change with the waveform: with noise, with a shift in time.

A change is a function ``s -> noisy audio`` with one number for each row, ``[B] -> [B, N]``: ``adding``,
``louder_noise`` and ``shifting`` make some. Slopes are forward-mode derivatives, one pass for all frames and classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.func import jvp

from nest_fn.config import Config
from nest_fn.encoder import subsample_features
from nest_fn.frontend import log_mel
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.model import Batch, forward, quantize

from .by_row.rows import chunks, plain

Change = Callable[[Tensor], Tensor]
"""From one number a row, ``[B]``, to a noisy signal ``[B, N]``."""


def adding(audio: Tensor, direction: Tensor) -> Change:
    """``audio + s * direction``, both ``[B, N]``."""
    return lambda s: audio + s[:, None] * direction


def louder_noise(audio: Tensor, noise: Tensor, snr: float) -> Change:
    """Noise at a signal-to-noise ratio of ``snr - s`` dB over the whole row: ``audio`` and ``noise`` are ``[B, N]``.

    Rows that are silent, or whose noise is, stay as they are.
    """
    return lambda s: at_snr(audio, noise, snr - s)


def at_snr(audio: Tensor, noise: Tensor, snr: Tensor | float) -> Tensor:
    """``audio [B, N]`` with ``noise [B, N]`` at ``snr`` dB, one number or ``[B]``; energies are of whole rows."""
    speech, other = (torch.linalg.vector_norm(x, dim=1) for x in (audio, noise))
    ratio = torch.as_tensor(snr, dtype=audio.dtype, device=audio.device)
    gain = torch.where(other > 0, speech / other.clamp(min=torch.finfo(audio.dtype).tiny), 0.0) * 10 ** (-ratio / 20)
    return audio + gain[:, None] * noise


def shifting(audio: Tensor) -> Change:
    """``audio [B, N]`` later by ``s`` samples or fractions of one, round the end: by the phase of its spectrum."""
    size = audio.shape[1]
    frequency = torch.arange(size // 2 + 1, device=audio.device, dtype=audio.dtype) * (2 * torch.pi / size)
    spectrum = torch.fft.rfft(audio, dim=1)

    def shifted(s: Tensor) -> Tensor:
        angle = s[:, None] * frequency
        turned = torch.complex(
            spectrum.real * angle.cos() + spectrum.imag * angle.sin(),
            spectrum.imag * angle.cos() - spectrum.real * angle.sin(),
        )
        return torch.fft.irfft(turned, n=size, dim=1)

    return shifted


class Slopes(NamedTuple):
    """Slopes along a change at s = 0."""

    log_probs: Tensor  # [B, T, C, K], nats per unit of s
    features: Tensor  # [B, M, F], log-mel per unit of s
    information: Tensor  # [B, T, K], nats per squared unit: the KL divergence of a small step is half of it times s^2
    lengths: Tensor  # [B], encoder frames


def slopes(
    params: Params, state: State, batch: Batch, cfg: Config, change: Change, *, key: Key | None = None
) -> Slopes:  # fmt: skip
    """Slopes of log-probabilities and log-mel features as the noisy signal ``[B, N]`` changes, by ``jvp``.

    With ``key`` under the mask that it draws, else unmasked. ``information`` is the Fisher information about s in the
    prediction of a token, ``sum_c p_c (d log p_c / ds)^2``. In evaluation mode.
    """
    cfg = plain(cfg)
    zero = batch["audio"].new_zeros(batch["audio"].shape[0])

    def run(s: Tensor) -> tuple[Tensor, Tensor]:
        noisy = change(s)
        output, _ = forward(params, state, {**batch, "noisy_audio": noisy}, cfg, key=key, apply_mask=key is not None)
        features, _ = log_mel(noisy, batch["noisy_audio_len"], cfg.preprocessor)
        scores = output.log_probs if output.log_probs.ndim == 4 else output.log_probs[..., None]
        return scores, features

    made: Any = jvp(run, (zero,), (torch.ones_like(zero),))
    (scores, _), (by_class, by_bin) = made
    with torch.no_grad():
        output, _ = forward(params, state, batch, cfg, apply_mask=False)
    information = (scores.exp() * by_class.square()).sum(dim=2)
    return Slopes(by_class, by_bin, information, output.encoded_len)


@torch.no_grad()
def target_tokens(
    params: Params, state: State, audio: Tensor, lengths: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Target tokens of a signal ``[B, N]``, int64 ``[B, T, K]``, and lengths in encoder frames ``[B]``."""
    mel, frames = log_mel(audio, lengths, cfg.preprocessor)
    x, short = subsample_features(params["encoder"], mel, frames, cfg.encoder)
    tokens = quantize(state, x.transpose(1, 2) if cfg.mask_position == "post_conv" else mel, cfg)
    return (tokens if tokens.ndim == 3 else tokens[..., None]), short


class Stability(NamedTuple):
    """Fractions of tokens that a change leaves as they are."""

    at: tuple[float, ...]  # the changes, S of them: dB, or samples
    kept: Tensor  # float64 [S], over all valid tokens and codebooks
    by_row: Tensor  # float64 [S, B]


def token_stability(
    params: Params, state: State, batch: Batch, noise: Tensor, cfg: Config, snr: Sequence[float], *,
    chunk: int | None = None,
) -> Stability:  # fmt: skip
    """Fraction of target tokens that stay the same when ``noise [B, N]`` is added to the clean signal at ``snr`` dB.

    The quantizer's own noise floor: of a noisy recording, the targets are known no better than this even unmasked.
    """
    return _stability(
        params,
        state,
        {**batch, "noise": noise},
        cfg,
        snr,
        lambda part, at: at_snr(part["audio"], part["noise"], at),
        chunk,
    )


def mixed_stability(
    params: Params, state: State, batch: Batch, cfg: Config, *, chunk: int | None = None
) -> Stability:  # fmt: skip
    """Fraction of target tokens that the noisy signal ``[B, N]`` of a batch has too: the floor at its own noise.

    What quantizing the input, with nothing hidden, would score. It bounds a model that reads tokens off what it hears,
    not one that undoes the noise.
    """
    return _stability(params, state, batch, cfg, [0.0], lambda part, _: part["noisy_audio"], chunk)


def shift_stability(
    params: Params, state: State, batch: Batch, cfg: Config, shifts: Sequence[float], *, chunk: int | None = None
) -> Stability:  # fmt: skip
    """Fraction of target tokens that stay when the clean signal ``[B, N]`` comes later by ``shifts`` samples."""

    def changed(part: Batch, at: float) -> Tensor:
        audio = part["audio"]
        return shifting(audio)(audio.new_full((audio.shape[0],), at))

    return _stability(params, state, batch, cfg, shifts, changed, chunk)


@torch.no_grad()
def _stability(
    params: Params, state: State, batch: Batch, cfg: Config, at: Sequence[float],
    changed: Callable[[Batch, float], Tensor], chunk: int | None,
) -> Stability:  # fmt: skip
    same, count = [], []
    for part in chunks(batch, chunk):
        tokens, lengths = target_tokens(params, state, part["audio"], part["audio_len"], cfg)
        valid = valid_mask(lengths, tokens.shape[1])[..., None].expand_as(tokens)
        count.append(valid.sum(dim=(1, 2)))
        moved = [target_tokens(params, state, changed(part, one), part["audio_len"], cfg)[0] for one in at]
        same.append(torch.stack([((new == tokens) & valid).sum(dim=(1, 2)) for new in moved]))
    kept, total = torch.cat(same, dim=1).double(), torch.cat(count).double()
    return Stability(tuple(at), kept.sum(dim=1) / total.sum().clamp(min=1), kept / total.clamp(min=1))
