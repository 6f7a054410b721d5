"""The feed-forward module: linear to ``hidden``, SiLU, dropout, linear back to ``D`` (reference 4.6)."""

from __future__ import annotations

from typing import TypedDict

import torch.nn.functional as F

from . import random
from .dropout import dropout
from .linear import LinearParams, init_linear, linear
from .types import Key, Tensor


class FeedForwardParams(TypedDict):
    """``linear1`` maps from ``D`` to the hidden width, ``linear2`` back to ``D``."""

    linear1: LinearParams
    linear2: LinearParams


def init_feed_forward(key: Key, width: int, hidden: int, bias: bool = True) -> FeedForwardParams:
    """Initialise ``linear1.weight [hidden, D]`` and ``linear2.weight [D, hidden]`` as torch.nn.Linear does."""
    first, second = random.split(key, 2)
    return {"linear1": init_linear(first, width, hidden, bias), "linear2": init_linear(second, hidden, width, bias)}


def feed_forward(
    params: FeedForwardParams, x: Tensor, *, rate: float = 0.0, key: Key | None = None, train: bool = False
) -> Tensor:
    """Two linear layers with SiLU between them: ``[..., D] -> [..., D]``; dropout at ``rate`` on hidden features."""
    hidden = dropout(F.silu(linear(params["linear1"], x)), rate, key=key, train=train)
    return linear(params["linear2"], hidden)
