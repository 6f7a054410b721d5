"""A batch as it was read, cut into the parts that are computed one after the other, on the device."""

from __future__ import annotations

from typing import Any

import torch

from nest_fn.layers.types import Tensor
from nest_fn.train.data.dataset import RawBatch

TENSORS = ("audio", "audio_len", "noise", "noise_len", "row", "utterance", "weight")
POOL = ("audio", "audio_len", "row", "weight")


def to_device(raw: RawBatch, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch on the device."""
    return {name: raw[name].to(device, non_blocking=True) for name in TENSORS}  # type: ignore[literal-required]


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
