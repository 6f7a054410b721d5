"""The decisions of ``mixer.lanes_above`` in one Triton kernel: words stay in registers, a decision is one byte.

Inductor instead keeps eight bytes for each decision between its kernels, which was 40 per cent of the memory traffic of
a Conformer block's forward pass. Imported on CUDA alone; ``tests/layers/test_mixer.py`` runs it in Triton's
interpreter, ``make gpu-check`` compiles it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .types import Tensor

BLOCK = 1024  # words a program


@triton.jit  # Triton reads annotations: there are none but its own
def lanes_above_kernel(  # type: ignore[no-untyped-def]
    keys, out, bound, n, blocks, GAMMA: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, BLOCK: tl.constexpr
):
    """``keys`` int64 ``[R, 2]`` -> ``out`` int32 ``[R, n]``: the four decisions of a word are the bytes of a number."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    seed, offset = tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1)
    z = ((index.to(tl.int64) + 1) * GAMMA + seed) ^ offset
    z = (z ^ (z.to(tl.uint64, bitcast=True) >> 27).to(tl.int64, bitcast=True)) * M1
    z = (z ^ (z.to(tl.uint64, bitcast=True) >> 33).to(tl.int64, bitcast=True)) * M2
    z = z ^ (z.to(tl.uint64, bitcast=True) >> 27).to(tl.int64, bitcast=True)
    packed = (z.to(tl.int16) > bound).to(tl.int32)
    packed |= ((z >> 16).to(tl.int16) > bound).to(tl.int32) << 8
    packed |= ((z >> 32).to(tl.int16) > bound).to(tl.int32) << 16
    packed |= ((z >> 48).to(tl.int16) > bound).to(tl.int32) << 24
    tl.store(out + row * n + index, packed, mask=index < n)


def lanes_above(key: Tensor, bound: int, count: int, constants: tuple[int, int, int]) -> Tensor:
    """Launch the kernel: keys int64 ``[..., 2]`` -> bool ``[..., count]``; ``constants`` are the mixer's three."""
    keys = key.reshape(-1, 2).contiguous()
    n = -(-count // 4)
    blocks = triton.cdiv(n, BLOCK)
    packed = torch.empty((keys.shape[0], n), dtype=torch.int32, device=key.device)
    if packed.numel():
        gamma, m1, m2 = constants
        with torch.accelerator.device_index(keys.device.index):  # Triton launches on the current device
            lanes_above_kernel[(keys.shape[0] * blocks,)](keys, packed, bound, n, blocks, gamma, m1, m2, BLOCK)
    return packed.view(torch.bool)[:, :count].reshape(*key.shape[:-1], count)
