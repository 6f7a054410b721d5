"""The four kinds of thing that flow through every layer, and the one thing that it may ask of other processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

Key: TypeAlias = Tensor
"""Randomness as a value: int64 ``[..., 2]`` holding ``(seed, offset)`` of Philox4x32-10. See ``random.py``."""

Params: TypeAlias = dict[str, Any]
"""What gradient descent changes: nested dicts and lists of tensors, leaf names as torch.nn has them."""

State: TypeAlias = dict[str, Any]
"""What is saved but not trained: running statistics, the frozen quantizer, a frozen mask embedding."""

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""A tensor of every process that holds a part of the batch, by rank: ``[...] -> [W, ...]``, with its gradient."""

__all__ = ["Gather", "Key", "Params", "State", "Tensor"]
