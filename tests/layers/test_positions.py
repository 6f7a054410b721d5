"""Sinusoids and the relative shift, by their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from nest_fn.layers import random
from nest_fn.layers.positions import absolute_positions, relative_positions, shift

LIKE = torch.zeros(0, dtype=torch.float64)


def entry(position: int, column: int, width: int) -> float:
    angle = position * math.exp(-(column // 2 * 2) * math.log(10000.0) / width)
    return math.cos(angle) if column % 2 else math.sin(angle)


@pytest.mark.parametrize("left,right", [(4, 4), (3, 1), (0, 5)])
def test_relative_positions_run_from_left_to_right(left: int, right: int) -> None:
    wanted = [[entry(p, c, 6) for c in range(6)] for p in range(left, -right - 1, -1)]
    torch.testing.assert_close(relative_positions(left, right, 6, LIKE), torch.tensor(wanted, dtype=torch.float64))


def test_absolute_positions() -> None:
    wanted = [[entry(p, c, 6) for c in range(6)] for p in range(7)]
    torch.testing.assert_close(absolute_positions(7, 6, LIKE), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_counts_beyond_its_integers(dtype: torch.dtype) -> None:
    """bfloat16 cannot hold 3001, but its encoding is that of 3001, rounded."""
    table = relative_positions(4000, 0, 8, torch.zeros(0, dtype=dtype))
    assert table.dtype == dtype
    torch.testing.assert_close(table, relative_positions(4000, 0, 8, torch.zeros(0)).to(dtype), atol=0, rtol=0)
    assert not torch.equal(table[999], table[1000])


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_shift_by_its_definition(frames: int) -> None:
    x = random.normal(random.key(0), (2, 3, frames, 2 * frames - 1))
    y = shift(x)
    for i in range(frames):
        for j in range(frames):
            assert torch.equal(y[:, :, i, j], x[:, :, i, frames - 1 - i + j])
