"""The functions that a training loss is made of, as a value: as they stand, or each compiled (train/step/compiled.py).

A compiled part is a graph of its own, and the Conformer block is one part for all layers, so that what a run compiles
depends on neither depth nor the number of shapes (docs/design.md, "Compilation").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import encoder
from .encoder import EncoderParts, subsample_features
from .frontend import log_mel
from .layers import random
from .layers.types import Key, Tensor
from .losses import score
from .masking import draw_mask
from .quantizer import quantize_features


class Keys(NamedTuple):
    """The draws of one forward pass, by name. A key that is None draws nothing."""

    clean: Key | None = None  # dither of the targets' signal, [B, 2]
    noisy: Key | None = None  # dither of the input, [B, 2]
    mask: Key | None = None  # [B, 2]
    dropout: Key | None = None  # [2]


def draw_keys(key: Key, rows: Tensor) -> Keys:
    """Keys by name. Signals and masks have a key for each row, so that a row's draws do not depend on its batch."""
    clean, noisy, masks, drop = random.split(key, 4).unbind(0)
    return Keys(random.fold_in(clean, rows), random.fold_in(noisy, rows), random.fold_in(masks, rows), drop)


class Parts(NamedTuple):
    """What ``loss_sum`` calls, in this order."""

    keys: Callable[[Key, Tensor], Keys]
    features: Callable[..., tuple[Tensor, Tensor]]
    mask: Callable[..., Tensor]
    subsample: Callable[..., tuple[Tensor, Tensor]]
    quantize: Callable[..., Tensor]
    encoder: EncoderParts
    score: Callable[..., tuple[Tensor, dict[str, Any]]]


EAGER = Parts(draw_keys, log_mel, draw_mask, subsample_features, quantize_features, encoder.EAGER, score)
