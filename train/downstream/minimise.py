"""Minimises a smooth function by PyTorch's L-BFGS; both probes are fitted with it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nest_fn.layers.types import Tensor


def minimise(objective: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """The point ``[...]`` that minimises ``objective: [...] -> []``, searched from ``start``. Deterministic."""
    point = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [point], max_iter=iterations, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        (point.grad,) = torch.autograd.grad(value := objective(point), [point])
        return value.detach()

    solver.step(closure)
    return point.detach()
