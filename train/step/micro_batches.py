"""A batch as it was read: sent to the device ahead of its step, and cut into the parts that are computed in turn."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nest_fn.layers.types import Tensor
from nest_fn.train.data.dataset import RawBatch

TENSORS = ("audio", "audio_len", "noise", "noise_len", "row", "utterance", "weight")
POOL = ("audio", "audio_len", "row", "weight")


class Sent(NamedTuple):
    """Tensors of a batch on their way to a CUDA device, and the event that marks their arrival."""

    tensors: dict[str, Tensor]
    arrived: torch.cuda.Event


def send(raw: RawBatch, device: torch.device) -> RawBatch:
    """The batch with its copy on the way to a CUDA device; on a CPU there is nothing to send.

    Called by a loader's thread, it pins the rows and copies them on a stream of its own while an earlier step computes.
    """
    if device.type != "cuda":
        return raw
    with torch.cuda.device(device):  # threads begin with device 0, where pinning would open a context
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            pinned = {name: raw[name].pin_memory() for name in TENSORS}  # type: ignore[literal-required]
            tensors = {name: leaf.to(device, non_blocking=True) for name, leaf in pinned.items()}
        return {**raw, "sent": Sent(tensors, stream.record_event())}


def to_device(raw: RawBatch, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch on the device: as ``send`` sent them, or copied now."""
    sent: Sent | None = raw.get("sent")
    if sent is None:
        return {name: raw[name].to(device, non_blocking=True) for name in TENSORS}  # type: ignore[literal-required]
    current = torch.cuda.current_stream(device)
    current.wait_event(sent.arrived)  # the device waits, the host does not
    for leaf in sent.tensors.values():
        leaf.record_stream(current)  # their memory is not given away before the step has read them
    return sent.tensors


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
