"""Triton kernels of ``subsampling_fused``: two convolutions and the ReLU between them, forward and backward.

A program makes a tile of positions by channels. For each of the nine positions that the second convolution reads, the
result of the first is a product of patches ``[P, 16]`` by weights ``[16, C]`` and lives in registers alone. Of the 16
numbers of a patch nine are features and the tenth is 1, for the bias; at a position that is padding all are 0, so that
its result is 0 too. Imported on CUDA alone; tests run the kernels in Triton's interpreter, ``make gpu-check`` compiles
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .types import Tensor

POSITIONS, CHANNELS = 32, 64  # of a tile
TAPS = 16  # rows of weights: nine taps, the bias, zeros
PROGRAMS = 512  # over positions, in the backward pass; each has partial sums of its own, so that the sum has one order


@triton.jit  # Triton reads annotations: there are none but its own
def _patches(x, row, inside, time, bin, frames, bins, pad, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Patches ``[P, 16]`` of features at positions of the first convolution's result; zeros where not ``inside``."""
    tap = tl.arange(0, TAPS)[None, :]
    at_time, at_bin = 2 * time[:, None] + tap // 3 - pad, 2 * bin[:, None] + tap % 3 - pad
    within = (at_time >= 0) & (at_time < frames) & (at_bin >= 0) & (at_bin < bins) & (tap < 9) & inside[:, None]
    found = tl.load(x + (row[:, None] * frames + at_time) * bins + at_bin, mask=within, other=0.0)
    return tl.where((tap == 9) & inside[:, None], 1.0, found.to(tl.float32))


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x, lengths, first, second, y, count, frames, bins, once, wide, narrow, channels, pad,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``x [B, F, M]`` -> ``y [B, T, M', C]``; ``once``: bins after the first convolution, ``wide, narrow``: T, M'."""
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, time, bin = position // (wide * narrow), position // narrow % wide, position % narrow
    real, present = position < count, channel < channels
    length = tl.load(lengths + row, mask=real, other=0)
    rows = tl.arange(0, TAPS)[:, None] * channels + channel[None, :]
    weight = tl.load(first + rows, mask=present[None, :], other=0.0).to(tl.float32)
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    total += tl.load(second + 9 * channels + channel, mask=present, other=0.0).to(tl.float32)[None, :]
    for tap in range(9):
        at, bin_at = 2 * time + tap // 3 - pad, 2 * bin + tap % 3 - pad
        inside = real & (at >= 0) & (at < length) & (bin_at >= 0) & (bin_at < once)
        patches = _patches(x, row, inside, at, bin_at, frames, bins, pad, TAPS)
        active = tl.maximum(tl.dot(patches, weight, input_precision=PRECISION), 0.0)
        total += active * tl.load(second + tap * channels + channel, mask=present, other=0.0).to(tl.float32)[None, :]
    place = position[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=real[:, None] & present[None, :])


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    grad, x, lengths, first, second, partial, count, frames, bins, once, wide, narrow, channels, pad,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of both weights over every ``programs``-th tile: ``partial [programs, 2, 16, C]`` float32."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    tap_row = tl.arange(0, TAPS)[:, None]
    rows = tap_row * channels + channel[None, :]
    weight = tl.load(first + rows, mask=present[None, :], other=0.0).to(tl.float32)
    to_first = tl.zeros((TAPS, CHANNELS), tl.float32)
    to_second = tl.zeros((TAPS, CHANNELS), tl.float32)
    tile = tl.program_id(0)
    while tile * POSITIONS < count:
        position = tile * POSITIONS + tl.arange(0, POSITIONS)
        row, time, bin = position // (wide * narrow), position // narrow % wide, position % narrow
        real = position < count
        length = tl.load(lengths + row, mask=real, other=0)
        place = position[:, None].to(tl.int64) * channels + channel[None, :]
        of = tl.load(grad + place, mask=real[:, None] & present[None, :], other=0.0).to(tl.float32)
        to_second += tl.where(tap_row == 9, tl.sum(of, axis=0)[None, :], 0.0)
        for tap in range(9):
            at, bin_at = 2 * time + tap // 3 - pad, 2 * bin + tap % 3 - pad
            inside = real & (at >= 0) & (at < length) & (bin_at >= 0) & (bin_at < once)
            patches = _patches(x, row, inside, at, bin_at, frames, bins, pad, TAPS)
            before = tl.dot(patches, weight, input_precision=PRECISION)
            to_second += tl.where(tap_row == tap, tl.sum(of * tl.maximum(before, 0.0), axis=0)[None, :], 0.0)
            factor = tl.load(second + tap * channels + channel, mask=present, other=0.0).to(tl.float32)
            through = tl.where(before > 0.0, of * factor[None, :], 0.0)
            to_first += tl.dot(tl.trans(patches), through, input_precision=PRECISION)
        tile += tl.num_programs(0)
    base = partial + tl.program_id(0) * 2 * TAPS * channels
    tl.store(base + rows, to_first, mask=present[None, :])
    tl.store(base + TAPS * channels + rows, to_second, mask=present[None, :])


def _precision(x: Tensor) -> str:
    """Of the products: TF32 holds bfloat16 exactly, and runs on tensor cores; float32 stays what it is."""
    return "tf32" if x.dtype == torch.bfloat16 else "ieee"


def forward(x: Tensor, lengths: Tensor, first: Tensor, second: Tensor, shape: tuple[int, int, int], pad: int) -> Tensor:
    """Launch: ``x [B, F, M]``, both weights ``[16, C]`` -> ``[B, T, M', C]``; ``shape`` is (M after one, T, M')."""
    batch, frames, bins = x.shape
    once, wide, narrow = shape
    channels, count = first.shape[1], batch * wide * narrow
    y = torch.empty((batch, wide, narrow, channels), dtype=first.dtype, device=x.device)
    grid = (triton.cdiv(count, POSITIONS), triton.cdiv(channels, CHANNELS))
    with torch.accelerator.device_index(x.device.index):  # Triton launches on the current device
        forward_kernel[grid](
            x.contiguous(), lengths.contiguous(), first.contiguous(), second.contiguous(), y, count, frames, bins,
            once, wide, narrow, channels, pad, POSITIONS, CHANNELS, TAPS, _precision(x),
        )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, lengths: Tensor, first: Tensor, second: Tensor, once: int, pad: int
) -> tuple[Tensor, Tensor]:
    """Launch: the gradient ``[B, T, M', C]`` -> those of both weights, float32 ``[16, C]``."""
    batch, frames, bins = x.shape
    _, wide, narrow, channels = grad.shape
    count = batch * wide * narrow
    programs = min(PROGRAMS, triton.cdiv(count, POSITIONS))
    partial = torch.empty((programs, 2, TAPS, channels), dtype=torch.float32, device=x.device)
    with torch.accelerator.device_index(x.device.index):
        backward_kernel[(programs, triton.cdiv(channels, CHANNELS))](
            grad.contiguous(), x.contiguous(), lengths.contiguous(), first.contiguous(), second.contiguous(), partial,
            count, frames, bins, once, wide, narrow, channels, pad, POSITIONS, CHANNELS, TAPS, _precision(x),
        )  # fmt: skip
    return partial[:, 0].sum(0), partial[:, 1].sum(0)
