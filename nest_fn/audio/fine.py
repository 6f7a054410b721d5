"""Resampling between rates whose ratio is too fine for a kernel with a filter for each output sample of a period.

44,056 Hz to 16,000 Hz is 5507:2000, and the kernel would have 11 million elements. Here the filter of each output
sample, by the definition of ``plain.resampler``, is computed when it is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nest_fn.layers.types import Tensor

from .plain import ROLLOFF, ZEROS

_TAPS = 1 << 20  # filter taps that are computed at a time


@dataclass(frozen=True)
class FineResampler:
    """Resampling from ``source`` to ``target`` Hz with a windowed sinc, for a few rows at a time."""

    source: int
    target: int

    def __call__(self, x: Tensor) -> Tensor:
        """Resample rows: ``[B, N] -> [B, ceil(N * target / source)]``; filters are computed in float64 and cast."""
        length = -(-x.shape[1] * self.target // self.source)
        cutoff = ROLLOFF * min(self.source, self.target)
        reach = math.ceil(ZEROS * self.source / cutoff)
        offsets = torch.arange(-reach, reach + 1, device=x.device)
        padded = F.pad(x, (reach, reach + 1))
        rows = max(1, _TAPS // len(offsets))
        blocks = [
            self._block(padded, torch.arange(first, min(first + rows, length), device=x.device), offsets, cutoff, reach)
            for first in range(0, length, rows)
        ]
        return torch.cat(blocks, dim=1) if blocks else x[:, :0]

    def _block(self, padded: Tensor, output: Tensor, offsets: Tensor, cutoff: float, reach: int) -> Tensor:
        """Output samples ``output [n]`` of the padded input: ``[B, n]``."""
        nearest = torch.div(output * self.source, self.target, rounding_mode="floor")
        past = (output * self.source - nearest * self.target).double() / self.target  # of an input sample: [0, 1)
        t = ((offsets - past[:, None]) * (cutoff / self.source)).clamp(-ZEROS, ZEROS)
        window = torch.cos(t * (math.pi / (2 * ZEROS))).square()
        kernel = (torch.sinc(t) * window * (cutoff / self.source)).to(padded.dtype)
        return (padded[:, nearest[:, None] + offsets + reach] * kernel).sum(dim=-1)
