"""Sinusoidal positions, relative and absolute, computed for the length at hand (reference 4.4)."""

from __future__ import annotations

import math

import torch

from .types import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines in the even and cosines in the odd columns, base 10000: ``[P] -> [P, D]``, in the positions' dtype."""
    rates = torch.exp(
        torch.arange(0, width, 2, dtype=positions.dtype, device=positions.device) * -(math.log(10000.0) / width)
    )
    angles = positions[:, None] * rates
    return torch.stack((torch.sin(angles), torch.cos(angles)), dim=-1).flatten(-2)


def _line(start: int, stop: int, step: int, like: Tensor) -> Tensor:
    # Half precision cannot count past 2048 (256 in bfloat16): tables are made in float32 at least.
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.arange(start, stop, step, dtype=dtype, device=like.device)


def relative_positions(left: int, right: int, width: int, like: Tensor) -> Tensor:
    """Encodings of query minus key, from ``left`` down to ``-right``: ``[left + right + 1, D]``, dtype of ``like``."""
    return sinusoids(_line(left, -right - 1, -1, like), width).to(like.dtype)


def absolute_positions(frames: int, width: int, like: Tensor) -> Tensor:
    """Encodings of positions ``0..frames-1``: ``[T, D]``, dtype of ``like``."""
    return sinusoids(_line(0, frames, 1, like), width).to(like.dtype)


def shift(scores: Tensor) -> Tensor:
    """Scores by relative position to scores by key: ``[..., T, 2T-1] -> [..., T, T]``.

    ``y[i, j] = x[i, T-1-i+j]``: row ``i`` moves left by ``T-1-i``. One zero column makes each row as long as the step
    between wanted diagonals, so that a reshape does the shift (Transformer-XL, arXiv 1901.02860, appendix B).
    """
    *lead, frames, _ = scores.shape
    padded = torch.nn.functional.pad(scores, (1, 0))
    return padded.reshape(*lead, 2 * frames, frames)[..., 1:, :].reshape(*lead, frames, 2 * frames - 1)[..., :frames]
