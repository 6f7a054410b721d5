"""The processes that train one model together, as a value: this process's rank, and collectives over all ranks.

With a single process every function here is the identity and no process group is used. Tensors on a GPU are
communicated by NCCL, those on a CPU by gloo; every rank receives the same bits, so that parameters stay equal without
being broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

from nest_fn.layers.types import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Rank ``rank`` of ``world`` processes; more than one communicate over the default process group."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes the run folder and the messages."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """Whether this is the only process."""
        return self.world == 1

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape: ``[...] -> [W, ...]``. Differentiable."""
        if self.is_single:
            return x[None]
        if x.dtype == torch.int16:  # a type that neither gloo nor NCCL can send
            return self.all_gather(x.contiguous().view(torch.uint8)).view(torch.int16)
        return _ready(collectives.all_gather_tensor(x[None].contiguous(), 0, _group()))

    def all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send ``sent[r]`` of the rows, in rank order, to each rank ``r``; return ``received[r]`` rows from each."""
        if self.is_single:
            return rows
        if rows.dtype == torch.int16:
            return self.all_to_all(rows.contiguous().view(torch.uint8), sent, received).view(torch.int16)
        return _ready(collectives.all_to_all_single(rows.contiguous(), received, sent, _group()))

    def all_reduce_sum(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of each leaf over the ranks; one collective for all leaves of a type."""
        if self.is_single:
            return dict(leaves)
        summed = dict(leaves)
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves.values()):
            names = [name for name, leaf in leaves.items() if leaf.dtype == dtype]
            parts = collectives.all_reduce_coalesced([leaves[name].contiguous() for name in names], "sum", _group())
            summed |= zip(names, map(_ready, parts), strict=True)
        return summed

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; reduced over the CPU, so that no device is synchronised."""
        if self.is_single:
            return flag
        return bool(_ready(collectives.all_reduce(torch.tensor(int(flag)), "max", _group())))

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, on every rank; for small objects."""
        if self.is_single:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def broadcast_(self, leaves: Sequence[Tensor]) -> None:
        """Overwrite tensors, whose shapes are equal on every rank, with those of rank 0."""
        for leaf in leaves if not self.is_single else ():
            dist.broadcast(leaf, src=0)


ALONE = Ranks()


def _group() -> Any:
    return dist.group.WORLD


def _ready(x: Tensor) -> Tensor:
    return collectives.wait_tensor(x)
