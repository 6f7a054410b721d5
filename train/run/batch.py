"""The one way from a batch as it was read to the micro-batches of a step: device, speaker exchange, division."""

from __future__ import annotations

from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.layers.types import Key, Tensor
from nest_fn.train.augment.speaker_exchange import gather_speaker_pool
from nest_fn.train.data.dataset import RawBatch
from nest_fn.train.data.transfer import to_device
from nest_fn.train.distributed.collectives import ALONE, Ranks

POOL = ("audio", "audio_len", "row", "weight")


def prepare_batch(
    raw: RawBatch, cfg: Config, key: Key, device: torch.device, ranks: Ranks = ALONE, parts: int = 1
) -> list[dict[str, Any]]:
    """This rank's rows of a batch as ``parts`` micro-batches on the device: ``audio`` int16 ``[B, N]`` and the rest.

    ``key`` is that of the step; with it, ranks find out which rows of others are mixed into their own, and exchange
    those. All ranks call this together.
    """
    batch = to_device(raw, device)
    pool = gather_speaker_pool(raw, batch["audio"], cfg.data.augment, key, ranks)
    return micro_batches(batch, parts, pool)


def micro_batches(batch: dict[str, Tensor], parts: int, pool: dict[str, Tensor] | None = None) -> list[dict[str, Any]]:
    """Rows ``k, k + parts, ...`` of a batch for each part ``k``, all of one shape: empty rows fill the last ones up.

    Each part holds ``pool`` (default: the batch), so that who is mixed into whom does not depend on ``parts``.
    """
    if parts == 1:
        return [batch if pool is None else batch | {"pool": pool}]
    extra = -batch["audio"].shape[0] % parts
    filled = {name: _with_empty_rows(leaf, extra) for name, leaf in batch.items()}
    pool = {name: batch[name] for name in POOL} if pool is None else pool
    return [{name: leaf[k::parts].contiguous() for name, leaf in filled.items()} | {"pool": pool} for k in range(parts)]


def _with_empty_rows(leaf: Tensor, extra: int) -> Tensor:
    """Zeros are what an empty row holds: no samples, weight 0, utterance 0."""
    return torch.cat((leaf, leaf.new_zeros(extra, *leaf.shape[1:]))) if extra else leaf
