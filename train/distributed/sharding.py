"""Parameters and optimizer state sharded over ranks (as in ZeRO, arXiv 1910.02054), by PyTorch's DTensor.

Each rank holds its rows of every leaf whose first axis divides evenly over the ranks, as plain tensors, so that the
optimizer, which works leaf by leaf, is unchanged. ``all_gather`` makes full leaves for the forward pass; its
gradient is the sum over the ranks of this rank's rows. The other leaves are replicated; they are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nest_fn.layers.tree import global_norm
from nest_fn.layers.types import Tensor

from .collectives import ALONE, Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh  # DTensor's imports take half a second: where it is used

_MIN_ELEMENTS = 1024  # smaller leaves are replicated: gathering them costs more than the memory it saves


@dataclass(frozen=True)
class Sharding:
    """Which leaves, by path, are sharded along their first axis, and over which ranks."""

    ranks: Ranks = ALONE
    sharded: Set[str] = frozenset()
    mesh: DeviceMesh | None = None

    def shard(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of full leaves, copied so that the rest can be freed."""
        rank, world = self.ranks.rank, self.ranks.world
        return {
            path: leaf.detach().tensor_split(world)[rank].clone() if path in self.sharded else leaf
            for path, leaf in leaves.items()
        }

    def all_gather(self, leaves: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Full leaves from every rank's rows; differentiable.

        ``dtype`` is the dtype in which sharded leaves are sent and received; their gradients are summed in their own.
        """
        return {path: self._gather(leaf, dtype) if path in self.sharded else leaf for path, leaf in leaves.items()}

    def _gather(self, leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        rows = DTensor.from_local(leaf, self.mesh, [Shard(0)], run_check=False)
        gathered = rows.redistribute(
            placements=[Replicate()], forward_dtype=dtype, backward_dtype=leaf.dtype if dtype else None
        )
        return gathered.to_local(grad_placements=[Partial()])

    def all_reduce_grads(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients summed over the ranks; those of sharded leaves already are, by ``all_gather``."""
        summed = self.ranks.all_reduce_sum({path: grad for path, grad in grads.items() if path not in self.sharded})
        return {path: summed.get(path, grad) for path, grad in grads.items()}

    def global_norm(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Root of the sum of squares of all leaves, each counted once: a scalar."""
        sharded = {path: leaf for path, leaf in leaves.items() if path in self.sharded}
        if not sharded:
            return global_norm(leaves)
        square = self.ranks.all_reduce_sum({"square": global_norm(sharded).square()})["square"]
        replicated = {path: leaf for path, leaf in leaves.items() if path not in self.sharded}
        return (square + global_norm(replicated).square()).sqrt() if replicated else square.sqrt()


REPLICATED = Sharding()


def make_sharding(leaves: Mapping[str, Tensor], ranks: Ranks, device: torch.device) -> Sharding:
    """Shard every leaf that is large enough and whose rows divide evenly over the ranks."""
    if ranks.is_single:
        return REPLICATED
    from torch.distributed.device_mesh import init_device_mesh

    large = {path: leaf for path, leaf in leaves.items() if leaf.ndim and leaf.numel() >= _MIN_ELEMENTS}
    sharded = frozenset(path for path, leaf in large.items() if leaf.shape[0] % ranks.world == 0)
    return Sharding(ranks, sharded, init_device_mesh(device.type, (ranks.world,)))
