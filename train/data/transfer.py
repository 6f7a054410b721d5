"""A batch on its way to the device: sent ahead of its step by a loader's thread, or copied when it is wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nest_fn.layers.types import Tensor

from .dataset import RawBatch

TENSORS = ("audio", "audio_len", "noise", "noise_len", "row", "utterance", "weight")


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
