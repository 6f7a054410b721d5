"""Chance: dropout and stochastic depth, from keys."""

from __future__ import annotations

import torch

from . import random
from .types import Key, Tensor


def _needs_key(what: str, rate: float, key: Key | None) -> Key:
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{what}: rate must lie in [0, 1), got {rate}.")
    if key is None:
        raise ValueError(f"{what}: train=True with rate {rate} needs key=; pass one, or train=False.")
    return key


def dropout(x: Tensor, rate: float, *, key: Key | None = None, train: bool = False) -> Tensor:
    """Set elements to 0 with probability ``rate`` (to 16 bits) and scale the rest by ``1 / (1 - rate)``.

    Keys ``[B, 2]`` decide for each row of ``x [B, ...]`` alone; a key ``[2]`` for all at once. No draw at rate 0.
    """
    if not train or rate == 0.0:
        return x
    kept = random.dropout_mask(_needs_key("dropout", rate, key), rate, x.shape)
    # As numbers of 8 bits, since PyTorch multiplies by bool several times more slowly on a CPU.
    return (x * kept.to(torch.uint8)).mul_(1.0 / (1.0 - rate))


def packed_decisions(
    shape: tuple[int, ...], rate: float, *, key: Key | None = None, train: bool = False
) -> Tensor | None:
    """What ``dropout`` decides for a tensor of this shape, int32 ``[n]`` or ``[B, n]`` as of ``random.dropout_bits``.

    ``n`` numbers hold 32 decisions each. None if all is kept.
    """
    if not train or rate == 0.0:
        return None
    return random.dropout_bits(_needs_key("dropout", rate, key), rate, shape)


def stochastic_depth(x: Tensor, y: Tensor, rate: float, *, key: Key | None = None, train: bool = False) -> Tensor:
    """A layer's output ``y`` or, with probability ``rate``, its input ``x``, for the whole batch (reference 4.7).

    The kept layer's contribution is scaled: ``x + (y - x) / (1 - rate)``. ``key`` is one key ``[2]``.
    """
    if not train or rate == 0.0:
        return y
    kept = random.uniform(_needs_key("stochastic_depth", rate, key), ()) >= rate
    return torch.where(kept, x + (y - x) * (1.0 / (1.0 - rate)), x)


def depth_rates(n_layers: int, rate: float, mode: str, start_layer: int) -> tuple[float, ...]:
    """Drop rate of each layer: 0 for the first ``start_layer``, then rising to ``rate`` or uniform (reference 4.7)."""
    rest = n_layers - start_layer
    if mode == "uniform":
        return tuple(0.0 if layer < start_layer else rate for layer in range(n_layers))
    return tuple(0.0 if layer < start_layer else (layer - start_layer + 1) / rest * rate for layer in range(n_layers))
