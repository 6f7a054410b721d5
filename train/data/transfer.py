"""Copies a batch to the device: ahead of its step in a worker thread, or when the step needs it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nest_fn.layers.types import Tensor

from .dataset import RawBatch

TENSORS = ("audio", "audio_len", "noise", "noise_len", "row", "utterance", "weight")


class Sent(NamedTuple):
    """Tensors of a batch whose copy to a CUDA device has been started, and the event that marks its completion."""

    tensors: dict[str, Tensor]
    arrived: torch.cuda.Event


def send(raw: RawBatch, device: torch.device) -> RawBatch:
    """Start copying the batch to a CUDA device; on a CPU, return it as it is.

    Called in a worker thread, it pins the tensors and copies them on a separate stream while an earlier step computes.
    """
    if device.type != "cuda":
        return raw
    with torch.cuda.device(device):  # new threads use device 0, where pinning would create a context
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            pinned = {name: leaf.pin_memory() for name, leaf in tensors_read(raw).items()}
            tensors = {name: leaf.to(device, non_blocking=True) for name, leaf in pinned.items()}
        return {**raw, "sent": Sent(tensors, stream.record_event())}


def tensors_read(raw: RawBatch) -> dict[str, Tensor]:
    """The tensors of a batch by name, on the CPU, as they were read."""
    return {name: raw[name] for name in TENSORS}  # type: ignore[literal-required]


def to_device(raw: RawBatch, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch on the device: those that ``send`` copied, or copied now."""
    sent: Sent | None = raw.get("sent")
    if sent is None:
        return {name: leaf.to(device, non_blocking=True) for name, leaf in tensors_read(raw).items()}
    current = torch.cuda.current_stream(device)
    current.wait_event(sent.arrived)  # the device waits, the host does not
    for leaf in sent.tensors.values():
        leaf.record_stream(current)  # the allocator must not reuse their memory before the step has read it
    return sent.tensors
