"""Resampling and edit distance: torchaudio's where it loads, else those of ``plain.py``, the same numbers.

torchaudio's last release, 2.11, names no version of PyTorch and is pure Python in the functions used here; whether it
loads beside a later PyTorch is found out at import, once for the process. ``nest-fn doctor`` says which are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from nest_fn.layers.types import Tensor

from . import plain
from .fine import FineResampler

_LARGEST_KERNEL = 4_000_000  # elements; above it, a filter is computed for each output sample


def _load(module: str) -> tuple[Any, str | None]:
    """A module of torchaudio and None, or None and why it does not load."""
    try:
        return import_module(f"torchaudio.{module}"), None
    except Exception as error:  # a build for another PyTorch fails in many ways
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


_functional, UNUSED_BECAUSE = _load("functional")
"""``UNUSED_BECAUSE``: why torchaudio is not used, in one line; None where it is."""


def resampler(rate: int, target: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """A function that resamples rows from ``rate`` to ``target`` Hz: ``[B, N] -> [B, ceil(N target / rate)]``.

    Its kernel is computed in float64 and then cast: one computed in float32 is off by up to 2e-5 of full scale.
    """
    divisor = math.gcd(rate, target)
    if (rate // divisor) * (target // divisor) > _LARGEST_KERNEL:
        return FineResampler(rate // divisor, target // divisor)
    transforms, _ = _load("transforms") if _functional is not None else (None, None)
    if transforms is None:
        return plain.resampler(rate, target, dtype)
    made: Callable[[Tensor], Tensor] = transforms.Resample(rate, target, dtype=torch.float64).to(dtype)
    return made


def edit_distance(one: Sequence[object], other: Sequence[object]) -> int:
    """Fewest insertions, deletions and substitutions from one sequence to the other (Levenshtein)."""
    return int((plain if _functional is None else _functional).edit_distance(one, other))
