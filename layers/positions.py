"""Sinusoidal position encodings, relative and absolute, computed for the given length (reference 4.4)."""

from __future__ import annotations

import math

import torch

from .types import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Encode positions: ``[P] -> [P, D]``, sines in even and cosines in odd columns, base 10000, same dtype."""
    rates = torch.exp(
        torch.arange(0, width, 2, dtype=positions.dtype, device=positions.device) * -(math.log(10000.0) / width)
    )
    angles = positions[:, None] * rates
    return torch.stack((torch.sin(angles), torch.cos(angles)), dim=-1).flatten(-2)


def _range(start: int, stop: int, step: int, like: Tensor) -> Tensor:
    # float16 is exact up to 2048 only, bfloat16 up to 256: positions are computed at least in float32.
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.arange(start, stop, step, dtype=dtype, device=like.device)


def relative_positions(left: int, right: int, width: int, like: Tensor) -> Tensor:
    """Encodings of query minus key, from ``left`` down to ``-right``: ``[left + right + 1, D]``, dtype of ``like``."""
    return sinusoids(_range(left, -right - 1, -1, like), width).to(like.dtype)


def absolute_positions(frames: int, width: int, like: Tensor) -> Tensor:
    """Encodings of positions ``0..frames-1``: ``[frames, D]``, in the dtype and on the device of ``like``."""
    return sinusoids(_range(0, frames, 1, like), width).to(like.dtype)


def shift(scores: Tensor) -> Tensor:
    """Reindex scores from relative positions to keys: ``[..., T, 2T-1] -> [..., T, T]``.

    ``y[i, j] = x[i, T-1-i+j]``: row ``i`` is shifted left by ``T-1-i``. After padding with one column of zeros, a
    reshape does the shift (Transformer-XL, arXiv 1901.02860, appendix B).
    """
    *lead, frames, _ = scores.shape
    padded = torch.nn.functional.pad(scores, (1, 0))
    return padded.reshape(*lead, 2 * frames, frames)[..., 1:, :].reshape(*lead, frames, 2 * frames - 1)[..., :frames]
