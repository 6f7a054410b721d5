"""The processes that train one model together, as a value: who am I, and sums over all of them.

Alone, every function here is the identity and PyTorch's engine is not touched. Tensors on a GPU go over NCCL, those on
a CPU over gloo; every rank gets the same bits back, so that parameters stay equal without being sent.
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
    """Rank ``rank`` of ``world``; with more than one, the default process group is theirs."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """Whether there is nobody else."""
        return self.world == 1

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape: ``[...] -> [W, ...]``. Differentiable."""
        if self.is_single:
            return x[None]
        if x.dtype == torch.int16:  # a type that neither gloo nor NCCL can send
            return self.all_gather(x.contiguous().view(torch.uint8)).view(torch.int16)
        return _ready(collectives.all_gather_tensor(x[None].contiguous(), 0, _group()))

    def all_to_all(self, rows: Tensor, sent: list[int], came: list[int]) -> Tensor:
        """Rows for each rank in turn, ``sent[r]`` for rank ``r`` -> the ``came[r]`` that rank ``r`` sent here."""
        if self.is_single:
            return rows
        if rows.dtype == torch.int16:
            return self.all_to_all(rows.contiguous().view(torch.uint8), sent, came).view(torch.int16)
        return _ready(collectives.all_to_all_single(rows.contiguous(), came, sent, _group()))

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
        """Whether it holds on any rank. Over the CPU, so that no device is waited for."""
        if self.is_single:
            return flag
        return bool(_ready(collectives.all_reduce(torch.tensor(int(flag)), "max", _group())))

    def broadcast_object(self, value: T) -> T:
        """A small value of rank 0, on every rank."""
        if self.is_single:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def broadcast_(self, leaves: Sequence[Tensor]) -> None:
        """Overwrite tensors, of one shape on every rank, by those of rank 0."""
        for leaf in leaves if not self.is_single else ():
            dist.broadcast(leaf, src=0)


ALONE = Ranks()


def _group() -> Any:
    return dist.group.WORLD


def _ready(x: Tensor) -> Tensor:
    return collectives.wait_tensor(x)
