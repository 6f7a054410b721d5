"""The decisions of ``mixer.lanes_above`` in one Triton kernel: words stay in registers, a decision is one byte.

Inductor instead keeps eight bytes for each decision between its kernels, which was 40 per cent of the memory traffic of
a Conformer block's forward pass. Imported on CUDA alone; ``tests/layers/test_mixer.py`` runs it in Triton's
interpreter, ``make gpu-check`` compiles it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .types import Tensor

BLOCK = 1024  # words a program


@triton.jit  # Triton reads annotations: there are none but its own
def words(keys, row, index, GAMMA: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of a row's key at counters ``index``, int64; see ``mixer.py``."""
    seed, offset = tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1)
    z = ((index.to(tl.int64) + 1) * GAMMA + seed) ^ offset
    z = (z ^ (z.to(tl.uint64, bitcast=True) >> 27).to(tl.int64, bitcast=True)) * M1
    z = (z ^ (z.to(tl.uint64, bitcast=True) >> 33).to(tl.int64, bitcast=True)) * M2
    return z ^ (z.to(tl.uint64, bitcast=True) >> 27).to(tl.int64, bitcast=True)


@triton.jit
def four_decisions(z, bound, DISTANCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which lanes of a word are above ``bound``: bits 0, ``DISTANCE``, twice and three times it of an int32."""
    packed = (z.to(tl.int16) > bound).to(tl.int32)
    packed |= ((z >> 16).to(tl.int16) > bound).to(tl.int32) << DISTANCE
    packed |= ((z >> 32).to(tl.int16) > bound).to(tl.int32) << 2 * DISTANCE
    return packed | ((z >> 48).to(tl.int16) > bound).to(tl.int32) << 3 * DISTANCE


@triton.jit
def lanes_above_kernel(  # type: ignore[no-untyped-def]
    keys, out, bound, n, blocks, GAMMA: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, BLOCK: tl.constexpr
):
    """``keys`` int64 ``[R, 2]`` -> ``out`` int32 ``[R, n]``: the four decisions of a word are the bytes of a number."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    packed = four_decisions(words(keys, row, index, GAMMA, M1, M2), bound, 8)
    tl.store(out + row * n + index, packed, mask=index < n)


@triton.jit
def packed_kernel(  # type: ignore[no-untyped-def]
    keys, out, bound, n, blocks, GAMMA: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, BLOCK: tl.constexpr
):
    """``keys`` int64 ``[R, 2]`` -> ``out`` int32 ``[R, n]``: the decisions of eight words are the bits of a number."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    number, part = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 8)[None, :]
    four = four_decisions(words(keys, row, number[:, None].to(tl.int64) * 8 + part, GAMMA, M1, M2), bound, 1)
    tl.store(out + row * n + number, tl.xor_sum(four << 4 * part, axis=1), mask=number < n)


def lanes_above(key: Tensor, bound: int, count: int, constants: tuple[int, int, int]) -> Tensor:
    """Launch the kernel: keys int64 ``[..., 2]`` -> bool ``[..., count]``; ``constants`` are the mixer's three."""
    made = _launch(lanes_above_kernel, key, bound, -(-count // 4), BLOCK, constants)
    return made.view(torch.bool)[:, :count].reshape(*key.shape[:-1], count)


def packed_lanes_above(key: Tensor, bound: int, count: int, constants: tuple[int, int, int]) -> Tensor:
    """Launch the kernel: keys int64 ``[..., 2]`` -> int32 ``[..., n]``, 32 decisions a number."""
    made = _launch(packed_kernel, key, bound, -(-count // 32), BLOCK // 8, constants)
    return made.reshape(*key.shape[:-1], made.shape[-1])


def _launch(
    kernel: Any, key: Tensor, bound: int, n: int, block: int, constants: tuple[int, int, int]
) -> Tensor:  # fmt: skip
    """``n`` numbers of each key, int32 ``[R, n]``; a program makes ``block``."""
    keys, blocks = key.reshape(-1, 2).contiguous(), triton.cdiv(n, block)
    out = torch.empty((keys.shape[0], n), dtype=torch.int32, device=key.device)
    if out.numel():
        with torch.accelerator.device_index(keys.device.index):  # Triton launches on the current device
            kernel[(keys.shape[0] * blocks,)](keys, out, bound, n, blocks, *constants, block)
    return out
