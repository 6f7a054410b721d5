"""A linear probe on a learned mixture of an encoder's layers, as in SUPERB (arXiv 2105.01051, section 3).

Each layer is standardised with the statistics of the training rows; the weights of the mixture are a softmax, learned
together with the linear map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nest_fn.layers.types import Tensor

from .minimise import minimise


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

    Half of ``penalty`` times the squared norm of the map is added to the mean cross-entropy. Raises ``ValueError``
    without layers.
    """
    if not layers:
        raise ValueError("fit_weighted_probe: no layer was given; want one or more of equal width")
    x = torch.stack(list(layers))
    mean, scale = x.mean(dim=1), x.std(dim=1, correction=0).clamp(min=1e-5)
    x = (x - mean[:, None]) / scale[:, None]
    width = x.shape[-1]
    shapes = (len(layers),), (classes, width), (classes,)

    def parts(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixture, weight, bias = point.split([math.prod(shape) for shape in shapes])
        return torch.softmax(mixture, 0), weight.view(classes, width), bias

    def objective(point: Tensor) -> Tensor:
        mixture, weight, bias = parts(point)
        mixed = torch.einsum("l,lnd->nd", mixture, x)
        return F.cross_entropy(F.linear(mixed, weight, bias), y) + 0.5 * penalty * weight.square().sum()

    return WeightedProbe(mean, scale, *parts(minimise(objective, torch.zeros(sum(map(math.prod, shapes))), iterations)))


def weighted_accuracy(probe: WeightedProbe, layers: Sequence[Tensor], y: Tensor) -> float:
    """Fraction of rows whose best class is the label."""
    x = (torch.stack(list(layers)) - probe.mean[:, None]) / probe.scale[:, None]
    mixed = torch.einsum("l,lnd->nd", probe.mixture, x)
    return float((F.linear(mixed, probe.weight, probe.bias).argmax(1) == y).double().mean())
