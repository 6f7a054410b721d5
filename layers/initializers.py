"""Initial values drawn from keys, float32 tensors of a given shape; the schemes are those of torch.nn.init.

On the meta device nothing is computed: PyTorch's arithmetic there is Python that imports its compiler, which takes a
second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import random
from .types import Key, Tensor


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan in, fan out) of a weight ``[out, in, *kernel]``, as torch.nn.init computes them.

    Raises ``ValueError`` for fewer than two axes.
    """
    if len(shape) < 2:
        raise ValueError(f"fans: a weight has at least 2 axes, got {list(shape)}; biases take the fan of their weight")
    receptive = math.prod(shape[2:])
    return shape[1] * receptive, shape[0] * receptive


def uniform(key: Key, shape: Sequence[int], bound: float) -> Tensor:
    """Uniform in [-bound, bound): float32 ``[*shape]``."""
    drawn = random.uniform(key, shape)
    return drawn if drawn.is_meta else (drawn * 2.0 - 1.0) * bound


def normal(key: Key, shape: Sequence[int], std: float = 1.0) -> Tensor:
    """Normal with mean 0 and standard deviation ``std``: float32 ``[*shape]``."""
    drawn = random.normal(key, shape)
    return drawn if drawn.is_meta else drawn * std


def torch_default(key: Key, shape: Sequence[int], fan_in: int) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), float32 ``[*shape]``: the default of torch.nn.Linear and Conv."""
    return uniform(key, shape, 1.0 / math.sqrt(fan_in))


def xavier_uniform(key: Key, shape: Sequence[int]) -> Tensor:
    """Uniform with variance 2 / (fan in + fan out), float32 ``[*shape]`` (Glorot and Bengio 2010)."""
    return uniform(key, shape, math.sqrt(6.0 / sum(fans(shape))))


def xavier_normal(key: Key, shape: Sequence[int]) -> Tensor:
    """Normal with variance 2 / (fan in + fan out), float32 ``[*shape]`` (Glorot and Bengio 2010)."""
    return normal(key, shape, math.sqrt(2.0 / sum(fans(shape))))
