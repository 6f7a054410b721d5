"""The layer-weighted probe finds the layer that knows, and what it knows."""

from __future__ import annotations

import pytest
import torch

from nest_fn.layers import random
from nest_fn.train.downstream.weighted_probe import fit_weighted_probe, weighted_accuracy


def test_finds_the_layer_that_knows() -> None:
    draws = random.normal(random.key(1), (3, 400, 8))
    y = random.randint(random.key(2), 0, 4, (400,))
    layers = [draws[0], draws[1] + 4.0 * torch.nn.functional.one_hot(y, 8), 100.0 * draws[2] + 7.0]
    probe = fit_weighted_probe([layer[:300] for layer in layers], y[:300], 4, 1e-3)
    assert probe.mixture.argmax() == 1 and probe.mixture[1] > 0.6
    assert float(probe.mixture.sum()) == pytest.approx(1.0)
    assert weighted_accuracy(probe, [layer[300:] for layer in layers], y[300:]) > 0.9
    again = fit_weighted_probe([layer[:300] for layer in layers], y[:300], 4, 1e-3)
    assert all(torch.equal(one, other) for one, other in zip(probe, again, strict=True))


def test_wants_layers() -> None:
    with pytest.raises(ValueError, match="no layer was given"):
        fit_weighted_probe([], torch.zeros(0, dtype=torch.int64), 2, 1e-3)
