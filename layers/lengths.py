"""Lengths and masks: which frames of a padded batch are real. Never a host sync."""

from __future__ import annotations

import torch

from .types import Tensor


def valid_mask(lengths: Tensor, width: int) -> Tensor:
    """True where a frame lies below its row's length: ``[B] -> bool [B, width]``."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def check_lengths(what: str, x: Tensor, lengths: Tensor) -> None:
    """Raise ``ValueError`` unless ``lengths`` is integer ``[B]`` for ``x [B, ...]``."""
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
    """Raise ``ValueError`` unless ``rows``, the names of a batch's rows for their draws, is int64 ``[B]``."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{what}: names of rows are a {type(rows).__name__}; pass an int64 tensor [{count}].")
    if tuple(rows.shape) != (count,) or rows.dtype != torch.int64:
        raise ValueError(f"{what}: names of rows are {rows.dtype} {list(rows.shape)}; pass int64 [{count}].")


def strided(length: Tensor | int, kernel: int, stride: int, padding: int, ceil: bool = False) -> Tensor | int:
    """Frames after a convolution or pooling; ``padding`` counts both sides together. Works on ints and tensors."""
    numerator = length + (padding - kernel) + (stride - 1 if ceil else 0)
    return (
        numerator // stride + 1
        if isinstance(numerator, int)
        else torch.div(numerator, stride, rounding_mode="floor") + 1
    )


def zero_padding(x: Tensor, valid: Tensor) -> Tensor:
    """``x [B, T, ...]`` with padded frames set to 0 (a NaN in padding is gone too)."""
    return torch.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0.0)
