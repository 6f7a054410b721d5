"""Loss grids against single calls, variance components against draws with known ones, ensembles against a loop."""

from __future__ import annotations

import pytest
import torch

from nest_fn import forward, key, loss
from nest_fn.analysis import randomness
from nest_fn.layers import random
from tests.analysis.models import small_batch, small_model


def test_a_grid_holds_the_losses_of_single_calls() -> None:
    (p0, state, cfg), (p1, _, _) = (small_model("preprocessor.dither=0", seed=seed) for seed in (0, 1))
    params, states = randomness.stack([p0, p1]), randomness.stack([state, state])
    noises = [small_batch(2, seed=seed) for seed in (1, 2)]
    batches = {name: torch.stack([batch[name] for batch in noises]) for name in noises[0]}
    keys = random.split(key(3), 3)
    grid = randomness.loss_grid(params, states, batches, cfg, masks=keys, dropouts=keys[1:], chunk=1)
    assert grid.shape == (2, 2, 3, 2)
    for model, p in enumerate((p0, p1)):
        for number, batch in enumerate(noises):
            wanted = loss(p, state, batch, cfg, key=keys[1])[0]  # one key for both: mask 1 and dropout 0
            torch.testing.assert_close(grid[model, number, 1, 0], wanted, rtol=1e-9, atol=0)
    assert len(grid.unique()) == grid.numel()


def test_components_are_those_of_the_draws() -> None:
    """Additive effects of known variance: 4, 1 and 0.25, and noise of 0.01."""
    draws = [random.normal(one, (40,), torch.float64) for one in random.split(key(3), 3)]
    values = 2 * draws[0][:, None, None] + draws[1][:, None] + 0.5 * draws[2] + 3
    values = values + 0.1 * random.normal(key(4), (40, 40, 40), torch.float64)
    found = randomness.variance_components(values, ("a", "b", "c"))
    for name, scale, draw in zip("abc", (4.0, 1.0, 0.25), draws, strict=True):
        assert found.components[name] == pytest.approx(scale * float(draw.var()), rel=0.01)
    assert found.rest == pytest.approx(0.01, rel=0.05)
    assert found.mean == pytest.approx(float(values.mean()))


def test_components_of_a_design_by_hand() -> None:
    """[[1, 2], [3, 6]]: mean squares 9, 4 and rest 1; components (9 - 1) / 2 and (4 - 1) / 2."""
    found = randomness.variance_components(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), ("row", "column"))
    assert found.components == pytest.approx({"row": 4.0, "column": 1.5})
    assert found.rest == pytest.approx(1.0)
    one = randomness.variance_components(torch.tensor([[1.0, 2.0]]), ("row", "column"))
    assert "row" not in one.components
    with pytest.raises(ValueError, match="one name an axis"):
        randomness.variance_components(torch.ones(2, 2), ("row",))


def test_an_ensemble_is_the_mean_of_its_models() -> None:
    models = [small_model(seed=seed) for seed in (0, 1, 2)]
    cfg, batch = models[0][2], small_batch(2)
    found = randomness.ensemble(
        randomness.stack([m[0] for m in models]), randomness.stack([m[1] for m in models]), batch, cfg, chunk=2
    )
    each = [forward(p, s, batch, cfg, apply_mask=False)[0].log_probs for p, s, _ in models]
    each = [one if one.ndim == 4 else one[..., None] for one in each]
    mean = torch.stack([one.exp() for one in each]).mean(dim=0)
    torch.testing.assert_close(found.log_probs.exp(), mean)
    disagreement = -(mean * mean.log()).sum(dim=2) - torch.stack([-(o.exp() * o).sum(dim=2) for o in each]).mean(dim=0)
    torch.testing.assert_close(found.disagreement, disagreement)
    assert float(found.disagreement.min()) > 0
