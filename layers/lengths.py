"""Lengths and masks: which frames of a padded batch are not padding. Nothing here synchronises with the device."""

from __future__ import annotations

import torch

from .types import Tensor


def valid_mask(lengths: Tensor, width: int) -> Tensor:
    """Mask that is True for frames before the end of their row: ``[B] -> bool [B, width]``."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def check_lengths(what: str, x: Tensor, lengths: Tensor) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``lengths`` is an integer tensor ``[B]`` for ``x [B, ...]``."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{what}: lengths are a {type(lengths).__name__}; pass an int64 tensor [B].")
    if lengths.ndim != 1 or lengths.shape[0] != x.shape[0]:
        raise ValueError(
            f"{what}: x {list(x.shape)} has {x.shape[0]} rows, lengths are {list(lengths.shape)}; "
            "pass one length a row."
        )
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what}: lengths are {lengths.dtype}; pass integers (int64).")


def check_rows(what: str, rows: Tensor, count: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``rows``, which identify the rows for draws, are int64 ``[B]``."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{what}: names of rows are a {type(rows).__name__}; pass an int64 tensor [{count}].")
    if tuple(rows.shape) != (count,) or rows.dtype != torch.int64:
        raise ValueError(f"{what}: names of rows are {rows.dtype} {list(rows.shape)}; pass int64 [{count}].")


def strided(length: Tensor | int, kernel: int, stride: int, padding: int, ceil: bool = False) -> Tensor | int:
    """Frames after a convolution or pooling, for an int or a tensor ``[...]`` of lengths in frames.

    ``padding`` is the sum of both sides; ``ceil`` rounds up, as ``ceil_mode`` of PyTorch's pooling does.
    """
    numerator = length + (padding - kernel) + (stride - 1 if ceil else 0)
    return (
        numerator // stride + 1
        if isinstance(numerator, int)
        else torch.div(numerator, stride, rounding_mode="floor") + 1
    )


def zero_padding(x: Tensor, valid: Tensor) -> Tensor:
    """Set padded frames of ``x [B, T, ...]`` to 0, NaN included; ``valid`` is bool ``[B, T]``."""
    return torch.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0.0)
