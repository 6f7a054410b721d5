"""The feed-forward module: widen, SiLU, dropout, narrow (reference 4.6)."""

from __future__ import annotations

from typing import TypedDict

import torch.nn.functional as F

from . import random
from .dropout import dropout
from .linear import LinearParams, init_linear, linear
from .types import Key, Tensor


class FeedForwardParams(TypedDict):
    """``linear1`` widens, ``linear2`` narrows."""

    linear1: LinearParams
    linear2: LinearParams


def init_feed_forward(key: Key, width: int, hidden: int, bias: bool = True) -> FeedForwardParams:
    """torch.nn.Linear's defaults."""
    first, second = random.split(key, 2)
    return {"linear1": init_linear(first, width, hidden, bias), "linear2": init_linear(second, hidden, width, bias)}


def feed_forward(
    params: FeedForwardParams, x: Tensor, *, rate: float = 0.0, key: Key | None = None, train: bool = False
) -> Tensor:
    """``[..., D] -> [..., D]``, dropout at ``rate`` on the widened features."""
    hidden = dropout(F.silu(linear(params["linear1"], x)), rate, key=key, train=train)
    return linear(params["linear2"], hidden)
