"""The four kinds of thing that flow through every layer."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor

Key: TypeAlias = Tensor
"""Randomness as a value: int64 ``[..., 2]`` holding ``(seed, offset)`` of Philox4x32-10. See ``random.py``."""

Params: TypeAlias = dict[str, Any]
"""What gradient descent changes: nested dicts and lists of tensors, leaf names as torch.nn has them."""

State: TypeAlias = dict[str, Any]
"""What is saved but not trained: running statistics, the frozen quantizer, a frozen mask embedding."""

__all__ = ["Key", "Params", "State", "Tensor"]
