"""Parameters and optimizer state cut over ranks (as in ZeRO, arXiv 1910.02054), by PyTorch's DTensor.

Each rank holds its rows of every leaf whose first axis all ranks can share, as plain tensors: what works leaf by leaf,
the optimizer for one, need not know. ``assemble`` makes whole leaves for the forward pass; its gradient is the sum over
ranks of one's own rows. Leaves that cannot be cut evenly stay whole; they are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from nest_fn.layers.types import Tensor
from nest_fn.train.step.optimizer import global_norm

from .collectives import ALONE, Ranks

_LEAST = 1024  # numbers; below it a collective costs more than it spares


@dataclass(frozen=True)
class Sharding:
    """Which leaves, by path, are cut along their first axis, and over whom."""

    ranks: Ranks = ALONE
    cut: Set[str] = frozenset()
    mesh: DeviceMesh | None = None

    def own(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of whole leaves, copied so that the rest can be freed."""
        rank, world = self.ranks.rank, self.ranks.world
        return {
            path: leaf.detach().tensor_split(world)[rank].clone() if path in self.cut else leaf
            for path, leaf in leaves.items()
        }

    def assemble(self, leaves: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Whole leaves from every rank's rows; differentiable.

        ``dtype`` is the precision that cut leaves travel in and arrive in; their gradients are summed in their own.
        """
        return {path: self._whole(leaf, dtype) if path in self.cut else leaf for path, leaf in leaves.items()}

    def _whole(self, leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
        rows = DTensor.from_local(leaf, self.mesh, [Shard(0)], run_check=False)
        gathered = rows.redistribute(
            placements=[Replicate()], forward_dtype=dtype, backward_dtype=leaf.dtype if dtype else None
        )
        return gathered.to_local(grad_placements=[Partial()])

    def total(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients summed over the ranks; those of cut leaves have been, by ``assemble``."""
        whole = self.ranks.total({path: grad for path, grad in grads.items() if path not in self.cut})
        return {path: whole.get(path, grad) for path, grad in grads.items()}

    def norm(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Root of the sum of squares of all leaves, each counted once: a scalar."""
        cut = {path: leaf for path, leaf in leaves.items() if path in self.cut}
        if not cut:
            return global_norm(leaves)
        square = self.ranks.total({"cut": global_norm(cut).square()})["cut"]
        whole = {path: leaf for path, leaf in leaves.items() if path not in self.cut}
        return (square + global_norm(whole).square()).sqrt() if whole else square.sqrt()


WHOLE = Sharding()


def make_sharding(leaves: Mapping[str, Tensor], ranks: Ranks, device: torch.device) -> Sharding:
    """Cut every leaf that is worth it and whose rows the ranks can share evenly."""
    if ranks.alone:
        return WHOLE
    worth = {path: leaf for path, leaf in leaves.items() if leaf.ndim and leaf.numel() >= _LEAST}
    cut = frozenset(path for path, leaf in worth.items() if leaf.shape[0] % ranks.world == 0)
    return Sharding(ranks, cut, init_device_mesh(device.type, (ranks.world,)))
