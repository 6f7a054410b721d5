"""A linear probe on a learned mixture of an encoder's layers, as SUPERB has it (arXiv 2105.01051, section 3).

Layers are standardised one by one with the training rows' statistics; their mixture's weights are a softmax, learned
together with the linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nest_fn.layers.types import Tensor


class WeightedProbe(NamedTuple):
    """Statistics ``[L, D]`` of each layer, the mixture ``[L]`` (sums to 1), and the linear map."""

    mean: Tensor
    scale: Tensor
    mixture: Tensor
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]


def fit_weighted_probe(
    layers: Sequence[Tensor], y: Tensor, classes: int, penalty: float, iterations: int = 150
) -> WeightedProbe:
    """Fit on training rows: layers ``[N, D]`` each, y int64 ``[N]``. Deterministic: L-BFGS from equal weights.

    Half of ``penalty`` times the map's squared norm is added to the mean cross-entropy, as in ``probe.py``. Raises
    ``ValueError`` without layers.
    """
    if not layers:
        raise ValueError("fit_weighted_probe: no layer was given; want one or more of equal width")
    x = torch.stack(list(layers))
    mean, scale = x.mean(dim=1), x.std(dim=1, correction=0).clamp(min=1e-5)
    x = (x - mean[:, None]) / scale[:, None]
    width = x.shape[-1]
    free = [torch.zeros(len(layers)), torch.zeros(classes, width), torch.zeros(classes)]
    leaves = [leaf.requires_grad_() for leaf in free]
    solver = torch.optim.LBFGS(leaves, max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        mixed = torch.einsum("l,lnd->nd", torch.softmax(leaves[0], 0), x)
        value = F.cross_entropy(F.linear(mixed, leaves[1], leaves[2]), y) + 0.5 * penalty * leaves[1].square().sum()
        value.backward()
        return value

    solver.step(closure)
    mixture, weight, bias = torch.softmax(leaves[0].detach(), 0), leaves[1].detach(), leaves[2].detach()
    return WeightedProbe(mean, scale, mixture, weight, bias)


def weighted_accuracy(probe: WeightedProbe, layers: Sequence[Tensor], y: Tensor) -> float:
    """Share of rows whose best class is the label."""
    x = (torch.stack(list(layers)) - probe.mean[:, None]) / probe.scale[:, None]
    mixed = torch.einsum("l,lnd->nd", probe.mixture, x)
    return float((F.linear(mixed, probe.weight, probe.bias).argmax(1) == y).double().mean())
