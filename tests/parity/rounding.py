"""How far rounding may carry a computation, derived in float64, so that no bound depends on the processor at hand.

Two bounds. ``features_bound`` is an analysis of log-mel features, which have singular points (a silent bin, a constant
bin) where no sampling finds the worst case. ``sensitivity`` is for everything smooth: what a computation does when its
inputs and weights move by a rounding each. A backward stable algorithm gives the exact result of inputs that moved
by a small multiple of that (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 1.5), ``SLACK``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from nest_fn.config.model import PreprocessorConfig
from nest_fn.frontend import _log, frames
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.types import Tensor
from nest_fn.mel import make_tables

EPS32, EPS64 = 2.0**-24, 2.0**-53  # unit roundoff: the largest relative error of one rounding
SLACK = 32.0  # roundings that a path through the network adds up to, a sum of n terms counting as sqrt(n) of them
DRAWS = 3
Leaves = dict[str, Tensor]


def double(x: Tensor) -> Tensor:
    """Floating tensors in float64, others as they are."""
    return x.double() if x.is_floating_point() else x


def sensitivity(f: Callable[[Leaves], Leaves], inputs: Leaves, eps: float = EPS32) -> tuple[Leaves, Leaves]:
    """``f(inputs)`` in float64, and for each output the largest change when each input's entries move by ``eps``."""
    exact = f({name: double(x) for name, x in inputs.items()})
    generator = torch.Generator().manual_seed(0)
    worst = {name: torch.zeros((), dtype=torch.float64) for name in exact}
    for _ in range(DRAWS):
        moved = f({name: _moved(double(x), eps, generator) for name, x in inputs.items()})
        worst = {name: torch.maximum(worst[name], (moved[name] - exact[name]).abs().max()) for name in exact}
    return exact, worst


def beyond(ours: Leaves, exact: Leaves, worst: Leaves, terms: int = 1, eps: float = EPS32) -> dict[str, float]:
    """For each output the largest error as a share of its bound, ``SLACK`` (sensitivity + eps x largest value).

    Gradients count together, as sums over ``terms`` positions. One that is zero in exact arithmetic, of a bias before
    batch norm, sums ``terms`` values less their mean, which was rounded once for all: the error is ``terms`` times it.
    """
    assert ours.keys() == exact.keys()
    gradients = max((float(x.abs().max()) for name, x in exact.items() if name.startswith("grad")), default=0.0)
    found = {}
    for name, x in exact.items():
        scale = gradients * terms if name.startswith("grad") else float(x.abs().max())
        bound = SLACK * (float(worst[name]) + eps * scale)
        found[name] = float((ours[name].double() - x).abs().max()) / max(bound, 1e-300)
    return found


def _moved(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return x
    return x * (1 + eps * (2 * torch.randint(0, 2, x.shape, generator=generator) - 1))


def features_bound(audio: Tensor, audio_len: Tensor, cfg: PreprocessorConfig, eps: float) -> Tensor:
    """How far rounding may carry ``log_mel`` of float64 ``audio``: ``[B, M, F]``, 0 beyond the lengths.

    With x the samples under a transform of n points, each bin X is wrong by at most about d = 2 log2(n) eps |x|
    (Higham, section 24.1; the factor 2 for pre-emphasis). A mel energy E = sum w |X|^2 is then wrong by at most
    2 d sqrt(sum w) sqrt(E) + d^2 sum w (Cauchy-Schwarz), by d sum w for magnitudes, and by 32 eps E for its sum.
    """
    from nest_fn.frontend import log_mel

    mel, _ = log_mel(audio, audio_len, _with(cfg, log=False, normalize=None, pad_to=0))
    lengths = frames(audio_len.clamp(max=audio.shape[1]), cfg)
    spread = make_tables(cfg).filters.double().sum(1)[:, None]
    d = 2 * math.log2(cfg.fft_length) * eps * _norm_near(audio, cfg, mel.shape[2])[:, None]
    error = d * spread if cfg.mag_power == 1.0 else 2 * d * spread.sqrt() * mel.clamp(min=0).sqrt() + d**2 * spread
    error = error + 32 * eps * mel.abs()
    middle, up, down = (_log(x, cfg) for x in (mel, mel + error, (mel - error).clamp(min=0)))
    wrong = torch.maximum(up - middle, middle - down) + 4 * eps * middle.abs()
    valid = valid_mask(lengths, mel.shape[2])[:, None]
    wrong = _normalised(middle, torch.where(valid, wrong, 0.0), valid, cfg, eps)
    return torch.where(valid, wrong, 0.0)


def _norm_near(audio: Tensor, cfg: PreprocessorConfig, count: int) -> Tensor:
    """Norm of the samples within ``n_fft`` of each frame's centre: ``[B, N] -> [B, F]``."""
    n = cfg.fft_length
    energy = F.avg_pool1d(F.pad(audio.square(), (n, n + cfg.hop_length * count))[:, None], 2 * n, cfg.hop_length)[:, 0]
    return (2 * n * energy[:, :count]).clamp(min=0).sqrt()


def _normalised(x: Tensor, wrong: Tensor, valid: Tensor, cfg: PreprocessorConfig, eps: float) -> Tensor:
    """The errors of ``(x - mean) / (std + 1e-5)``: of x, of the mean (their mean), of the deviation (their norm)."""
    if cfg.normalize not in ("per_feature", "all_features"):
        return wrong
    axes = (2,) if cfg.normalize == "per_feature" else (1, 2)
    shown = valid.expand_as(x)
    number = shown.sum(axes, keepdim=True).clamp(min=1)
    mean = torch.where(shown, x, 0.0).sum(axes, keepdim=True) / number
    of_mean = wrong.sum(axes, keepdim=True) / number + 4 * eps * mean.abs()
    of_std = (wrong.square().sum(axes, keepdim=True) / (number - 1).clamp(min=1)).sqrt() + of_mean
    centred = torch.where(shown, x - mean, 0.0)
    std = (centred.square().sum(axes, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
    least = (std - of_std).clamp(min=0) + 1e-5
    return (wrong + of_mean) / least + centred.abs() * (of_std / least) / (std + 1e-5) + 8 * eps * centred.abs() / least


def _with(cfg: PreprocessorConfig, **changes: Any) -> PreprocessorConfig:
    import dataclasses

    return dataclasses.replace(cfg, **changes)
