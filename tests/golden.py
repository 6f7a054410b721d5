"""The fixed signal and weights for which the reference's golden numbers were computed (reference 12).

Their values are float32, their tensors float64: what is computed from them does not depend on a processor's float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def audio() -> tuple[torch.Tensor, torch.Tensor]:
    """Two tones and a sawtooth, full and half as loud: ``[2, 16000]``; the second row counts to 12000 only."""
    n = np.arange(16000, dtype=np.float64)
    x = 0.3 * np.sin(2 * np.pi * 220 * n / 16000) + 0.1 * np.sin(2 * np.pi * 1330 * n / 16000 + 0.5)
    row = torch.from_numpy((x + 0.01 * (((7919 * n) % 1000) / 500 - 1)).astype(np.float32)).double()
    return torch.stack((row, 0.5 * row)), torch.tensor([16000, 12000])


def weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """A weight made from its ``state_dict`` name."""
    wave = np.sin(sum(map(ord, name)) % 97 + 0.7 * np.arange(math.prod(shape), dtype=np.float64))
    if name.endswith("running_var"):
        value = 1 + 0.5 * wave**2
    elif name.endswith("weight") and len(shape) == 1:
        value = 1 + 0.1 * wave
    elif len(shape) == 1 or "pos_bias_" in name or name.endswith("running_mean"):
        value = 0.1 * wave
    else:
        value = wave / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32)).double().reshape(tuple(shape))


def check(x: torch.Tensor, numbers: Mapping[tuple[int, ...], float], tolerance: float = 2e-5) -> None:
    """Assert single entries of ``x``; the numbers have five decimals and come of a float32 run."""
    for index, wanted in numbers.items():
        assert abs(float(x[index]) - wanted) <= tolerance, (index, float(x[index]), wanted)
