"""Optimizers as pairs of pure functions: ``init(params) -> state``, ``update(params, grads, state, lr) -> both new``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nest_fn.config import OptimConfig
from nest_fn.layers.tree import flatten, tree_map
from nest_fn.layers.types import Params, Tensor


class Optimizer(NamedTuple):
    """A rule of descent. ``update(params, grads, state, lr) -> (params, state)``; nothing given is written to."""

    init: Callable[[Params], Any]
    update: Callable[[Params, Params, Any, Tensor], tuple[Params, Any]]


class AdamState(NamedTuple):
    """Updates done and the running means of gradients and of their squares."""

    count: Tensor  # float32, so that a compiled update needs no conversion
    mean: Params
    square: Params


class MomentumState(NamedTuple):
    """Updates done and the velocity."""

    count: Tensor
    velocity: Params


def adamw(
    betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8, weight_decay: float = 1e-3, decoupled: bool = True
) -> Optimizer:
    """Adam with decay of all parameters, biases and norms too, as NEST has it (arXiv 1711.05101; spec 6.4).

    ``decoupled=False`` adds the decay to the gradient instead, which is torch.optim.Adam.
    """
    beta1, beta2 = betas

    def init(params: Params) -> AdamState:
        return AdamState(_zero(params), tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))

    def update(params: Params, grads: Params, state: AdamState, lr: Tensor) -> tuple[Params, AdamState]:
        count = state.count + 1
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count

        def one(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if not decoupled and weight_decay:
                g = g + weight_decay * p
            m = torch.lerp(m, g, 1 - beta1)
            v = v * beta2 + g * g * (1 - beta2)
            kept = p * (1 - lr * weight_decay) if decoupled and weight_decay else p
            return kept - (lr / correction1) * m / (torch.sqrt(v) / torch.sqrt(correction2) + eps), m, v

        moved = tree_map(lambda *leaves: _Three(one(*leaves)), params, grads, state.mean, state.square)
        params, mean, square = (tree_map(lambda leaf, i=i: leaf.three[i], moved) for i in range(3))
        return params, AdamState(count, mean, square)

    return Optimizer(init, update)


class _Three:
    """Three results held as one leaf of a tree."""

    def __init__(self, three: tuple[Tensor, Tensor, Tensor]) -> None:
        self.three = three


def sgd(momentum: float = 0.9, weight_decay: float = 0.0) -> Optimizer:
    """Gradient descent with momentum, as torch.optim.SGD."""

    def init(params: Params) -> MomentumState:
        return MomentumState(_zero(params), tree_map(torch.zeros_like, params))

    def update(params: Params, grads: Params, state: MomentumState, lr: Tensor) -> tuple[Params, MomentumState]:
        velocity = tree_map(
            lambda p, g, u: u * momentum + (g + weight_decay * p if weight_decay else g), params, grads, state.velocity
        )
        return tree_map(lambda p, u: p - lr * u, params, velocity), MomentumState(state.count + 1, velocity)

    return Optimizer(init, update)


def make_optimizer(cfg: OptimConfig) -> Optimizer:
    """The optimizer that ``optim`` describes."""
    if cfg.name == "sgd":
        return sgd(cfg.momentum, cfg.weight_decay)
    return adamw(cfg.betas, cfg.eps, cfg.weight_decay, decoupled=cfg.name == "adamw")


def global_norm(tree: Params) -> Tensor:
    """Root of the sum of squares of all leaves, float32."""
    leaves = list(flatten(tree).values())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(leaves)).float())


def clip(grads: Params, norm: Tensor, limit: float) -> Params:
    """Gradients scaled down to a global norm of ``limit``; 0 means no limit."""
    if limit <= 0:
        return grads
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda grad: grad * scale.to(grad.dtype), grads)


def _zero(params: Params) -> Tensor:
    first = next(iter(flatten(params).values()))
    return torch.zeros((), dtype=torch.float32, device=first.device)
