"""Optimizers as pairs of functions: ``init(params) -> state``, ``update(params, grads, state, lr) -> both new``.

The arithmetic is torch.optim's own, through its functional form and fused kernels. These write in place; here they are
given copies, so that ``update`` is pure, unless its caller donates its arguments and promises to forget them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim.adam import adam as torch_adam
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.sgd import sgd as torch_sgd

from nest_fn.config import OptimConfig
from nest_fn.layers.types import Tensor

Leaves = Mapping[str, Tensor]
"""Parameters by dotted path (``flatten`` of a tree)."""


class Update(Protocol):
    """``update(params, grads, state, lr) -> (params, state)``, leaves by path."""

    def __call__(
        self, params: Leaves, grads: Leaves, state: Any, lr: float, *, donate: bool = False
    ) -> tuple[dict[str, Tensor], Any]:
        """``donate=True`` may overwrite ``params`` and ``state`` instead of copying them."""


class Optimizer(NamedTuple):
    """An optimizer as two functions."""

    init: Callable[[Leaves], Any]
    update: Update


class AdamState(NamedTuple):
    """Updates done (float32 scalar) and the running means of gradients and of their squares, by path."""

    updates: Tensor
    mean: dict[str, Tensor]
    square: dict[str, Tensor]


class MomentumState(NamedTuple):
    """Updates done (float32 scalar) and velocity, by path."""

    updates: Tensor
    velocity: dict[str, Tensor]


def adamw(
    betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8, weight_decay: float = 1e-3, decoupled: bool = True
) -> Optimizer:
    """Adam with decay of all parameters, biases and norms too, as NEST has it (arXiv 1711.05101; reference 6.4).

    ``decoupled=False`` adds the decay to the gradient instead: torch.optim.Adam.
    """
    rule = torch_adamw if decoupled else torch_adam

    def init(params: Leaves) -> AdamState:
        return AdamState(_zero(params), _zeros_like(params), _zeros_like(params))

    def update(
        params: Leaves, grads: Leaves, state: AdamState, lr: float, *, donate: bool = False
    ) -> tuple[dict[str, Tensor], AdamState]:
        params, mean, square = (_own(tree, donate) for tree in (params, state.mean, state.square))
        grads = _dense(grads)
        # The kernel counts up for each tensor; ours is one count for all.
        counts = [state.updates.clone() for _ in params]
        rule(
            list(params.values()), [grads[path] for path in params], [mean[path] for path in params],
            [square[path] for path in params], [], counts, fused=True, amsgrad=False, maximize=False,
            beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
        )  # fmt: skip
        return params, AdamState(state.updates + 1, mean, square)

    return Optimizer(init, update)


def sgd(momentum: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    """Gradient descent with momentum: torch.optim.SGD."""

    def init(params: Leaves) -> MomentumState:
        return MomentumState(_zero(params), _zeros_like(params))

    def update(
        params: Leaves, grads: Leaves, state: MomentumState, lr: float, *, donate: bool = False
    ) -> tuple[dict[str, Tensor], MomentumState]:
        params, velocity = _own(params, donate), _own(state.velocity, donate)
        grads = _dense(grads)
        torch_sgd(
            list(params.values()), [grads[path] for path in params], [velocity[path] for path in params],
            foreach=True, fused=False, weight_decay=weight_decay, momentum=momentum, lr=lr, dampening=0.0,
            nesterov=False, maximize=False,
        )  # fmt: skip
        return params, MomentumState(state.updates + 1, velocity)

    return Optimizer(init, update)


def make_optimizer(cfg: OptimConfig) -> Optimizer:
    """The optimizer that ``optim`` describes."""
    if cfg.name == "sgd":
        return sgd(cfg.momentum, cfg.weight_decay)
    return adamw(cfg.betas, cfg.eps, cfg.weight_decay, decoupled=cfg.name == "adamw")


def scale(leaves: Leaves, factor: Tensor) -> dict[str, Tensor]:
    """All leaves times a scalar."""
    return dict(zip(leaves, torch._foreach_mul(list(leaves.values()), factor), strict=True))


def _own(leaves: Leaves, donate: bool) -> dict[str, Tensor]:
    dense = _dense(leaves)
    return dense if donate else {path: leaf.clone() for path, leaf in dense.items()}


def _dense(leaves: Leaves) -> dict[str, Tensor]:
    """Leaves as contiguous tensors.

    PyTorch's fused kernels walk through memory, whatever the strides: with a transposed gradient, as a convolution may
    give it, they would update the wrong elements without a word (torch.optim never sees such gradients).
    """
    return {path: leaf.contiguous() for path, leaf in leaves.items()}


def _zeros_like(leaves: Leaves) -> dict[str, Tensor]:
    return {path: torch.zeros_like(leaf) for path, leaf in leaves.items()}


def _zero(leaves: Leaves) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=next(iter(leaves.values())).device)
