"""The functions that make up the training loss, as a value: eager, or each compiled (train/step/compiled.py).

Each compiled part is a separate graph, and the Conformer block is one part for all layers, so that the number of
graphs does not depend on the number of layers or shapes (docs/design.md, "Compilation").
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
    """Keys of one forward pass, by use; None disables the draw."""

    clean: Key | None = None  # dither of the clean signal, [B, 2]
    noisy: Key | None = None  # dither of the noisy signal, [B, 2]
    mask: Key | None = None  # [B, 2]
    dropout: Key | None = None  # [2]


def draw_keys(key: Key, rows: Tensor) -> Keys:
    """Derive all keys of a forward pass from ``key [2]`` and ``rows [B]``.

    Signals and masks have one key for each row, ``[B, 2]``, so that a row's draws do not depend on its batch.
    """
    clean, noisy, masks, drop = random.split(key, 4).unbind(0)
    return Keys(random.fold_in(clean, rows), random.fold_in(noisy, rows), random.fold_in(masks, rows), drop)


class Parts(NamedTuple):
    """The functions that ``loss_sum`` calls, in this order."""

    keys: Callable[[Key, Tensor], Keys]
    features: Callable[..., tuple[Tensor, Tensor]]
    mask: Callable[..., Tensor]
    subsample: Callable[..., tuple[Tensor, Tensor]]
    quantize: Callable[..., Tensor]
    encoder: EncoderParts
    score: Callable[..., tuple[Tensor, dict[str, Any]]]


EAGER = Parts(draw_keys, log_mel, draw_mask, subsample_features, quantize_features, encoder.EAGER, score)
