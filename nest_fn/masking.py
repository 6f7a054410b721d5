"""Random block masking of the encoder's input; each utterance's mask is drawn from its own key (reference 3).

Element ``t`` of the uniform draws of an utterance's key belongs to frame ``t``, so that a mask depends neither on the
padded width nor on the other rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .config.model import MaskingConfig
from .config.required import required
from .layers import random
from .layers.initializers import normal
from .layers.lengths import check_lengths
from .layers.types import Key, Params, State, Tensor

SHORT_MASK = 8  # frames masked at the start of a short utterance, for any block size
EMBEDDING_STD = 0.1


def init_masking(key: Key, cfg: MaskingConfig) -> tuple[Params, State]:
    """Initialise the mask embedding ``[feat_in]``: in params if it is trained, else in state (reference 3).

    It is drawn from N(0, 0.1^2), or filled with the constant ``mask_value``, which is never trained.
    """
    width = required(cfg.feat_in, "masking.feat_in")
    if cfg.mask_value is not None:
        return {}, {"embedding": torch.full((width,), float(cfg.mask_value), device=key.device)}
    embedding = {"embedding": normal(key, (width,), EMBEDDING_STD)}
    return ({}, embedding) if cfg.freeze else (embedding, {})


def draw_mask(keys: Key, lengths: Tensor, frames: int, cfg: MaskingConfig, block: int) -> Tensor:
    """Draw which frames are masked: keys ``[2]`` or ``[B, 2]``, lengths ``[B]`` (frames) -> bool ``[B, frames]``.

    ``block`` is the length of a block in frames: ``cfg.block_size``, divided by the subsampling factor under post_conv.
    Padded frames are never masked. Lengths are clamped to ``frames``. See reference 3.1 and 3.2. Raises ``TypeError``
    or ``ValueError`` for wrong keys, lengths and settings.
    """
    random.check_key(keys, "draw_mask: keys")
    check_lengths("draw_mask", lengths, lengths)
    if block < 1 or not 0 <= cfg.mask_prob <= 1:
        raise ValueError(f"draw_mask: want block >= 1 and mask_prob in [0, 1], got {block} and {cfg.mask_prob}.")
    rows = random.split(keys, lengths.shape[0]) if keys.ndim == 1 else keys
    length = lengths.to(torch.int64).clamp(min=0, max=frames)[:, None]  # [B, 1]
    time = torch.arange(frames, device=lengths.device)  # [F]
    blocks = (_overlapping if cfg.allow_overlap else _non_overlapping)(rows, length, time, cfg, block)
    # Q15: without overlap, the reference's mask of a short utterance may exceed its length.
    masked = torch.where(length <= _max_short_length(block, cfg.max_mask_ratio), time < SHORT_MASK, blocks)
    return masked & (time < length)


def apply_mask(features: Tensor, mask: Tensor, embedding: Tensor) -> Tensor:
    """Replace masked frames by the embedding: ``[B, M, F], bool [B, F], [M] -> [B, M, F]``, in the features' dtype.

    Raises ``ValueError`` if the shapes do not match.
    """
    if features.ndim != 3 or mask.shape != (features.shape[0], features.shape[2]):
        raise ValueError(
            f"apply_mask: features {list(features.shape)} want a mask [B, F], got {list(mask.shape)}; "
            f"draw it for the same batch and width."
        )
    if embedding.shape != (features.shape[1],):
        raise ValueError(
            f"apply_mask: features {list(features.shape)} want an embedding [{features.shape[1]}], "
            f"got {list(embedding.shape)}; check masking.feat_in."
        )
    return torch.where(mask[:, None, :], embedding.to(features.dtype)[:, None], features)  # Q17: any float dtype


def _max_short_length(block: int, ratio: float) -> int:
    """Length in frames of the longest short utterance, one with ``block >= ratio * length``."""
    if ratio <= 0:
        raise ValueError(f"draw_mask: max_mask_ratio wants a number above 0, got {ratio}.")
    length = int(block / ratio)
    return length + 1 if block >= ratio * (length + 1) else length


def _overlapping(keys: Key, length: Tensor, time: Tensor, cfg: MaskingConfig, block: int) -> Tensor:
    """Blocks that may overlap: ``[B, F]``.

    The reference draws a Binomial(length - block, p) number of distinct starts below length - block, which is
    equivalent to starting a block at each of these frames with probability p. Frame length - 1 is therefore never
    masked (Q13).
    """
    draw_keys, force_keys = random.split(keys, 2)
    possible = time < length - block
    starts = possible & random.bernoulli(draw_keys, cfg.mask_prob, (keys.shape[0], time.shape[0]))
    if cfg.force_block:  # Q14
        forced = random.randint(force_keys, 0, (length[:, 0] - block).clamp(min=1), (keys.shape[0],))
        starts = torch.where(starts.any(-1, keepdim=True), starts, time == forced[:, None])
    # A frame is masked if a block starts at it or at one of the `block - 1` frames before it.
    begun = starts.to(torch.int32).cumsum(-1)
    before = F.pad(begun, (block, 0))[:, : time.shape[0]]
    return begun > before


def _non_overlapping(keys: Key, length: Tensor, time: Tensor, cfg: MaskingConfig, block: int) -> Tensor:
    """Blocks in distinct slots of a grid with a random offset, so that they do not overlap: ``[B, F]``.

    ``mask_prob`` is the fraction of frames to mask. If the blocks do not fit, they shrink; the offset is drawn for the
    full block size, so that some start beyond the length and are dropped (Q16: the reference writes out of bounds).
    """
    order_keys, offset_keys = random.split(keys, 2)
    wanted = torch.ceil(length * cfg.mask_prob / block).to(torch.int64)  # [B, 1]
    offset = random.randint(offset_keys, 0, block, (keys.shape[0],))[:, None]
    shrunk = (length // (wanted + 1)).clamp(min=1)
    size = torch.where((wanted + 1) * block > length, shrunk, block)
    slots = length // size - 1
    # Choose the `wanted` slots with the smallest uniform draws (there are never more slots than frames).
    draws = random.uniform(order_keys, (keys.shape[0], time.shape[0]))
    draws = torch.where(time < slots, draws, 2.0)
    rank = draws.argsort(dim=-1, stable=True).argsort(dim=-1)
    chosen = (rank < wanted) & (time < slots)
    slot = (time - offset) // size
    return (slot >= 0) & chosen.gather(-1, slot.clamp(min=0))
