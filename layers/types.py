"""Types of the arguments and results of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

Key: TypeAlias = Tensor
"""A random key: int64 ``[..., 2]`` with ``(seed, offset)`` of Philox4x32-10. See ``random.py``."""

Params: TypeAlias = dict[str, Any]
"""What gradient descent updates: nested dicts and lists of tensors, with the leaf names of torch.nn."""

State: TypeAlias = dict[str, Any]
"""What is saved but not trained: running statistics, the frozen quantizer, a frozen mask embedding."""

Gather: TypeAlias = Callable[[Tensor], Tensor]
"""A differentiable all-gather over the processes that share a batch, in the order of ranks: ``[...] -> [W, ...]``."""

__all__ = ["Gather", "Key", "Params", "State", "Tensor"]
