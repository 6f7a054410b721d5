"""The noise scale weighted by curvature: logistic regression in closed form, and the loop over rows."""

from __future__ import annotations

import itertools

import pytest
import torch

from nest_fn import key
from nest_fn.analysis import noise_scale
from nest_fn.analysis.curvature import as_product, hessian_vector
from nest_fn.analysis.gradients import per_example_gradients
from nest_fn.analysis.trees import to_vector
from nest_fn.layers import random
from nest_fn.layers.tree import tree_map
from tests.analysis.models import small_batch, small_model

KEY = key(5)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own jvp


def logistic(rows: int = 40, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients ``(p_i - y_i) x_i`` of the rows, and the Hessian ``X^T diag(p (1 - p)) X / n``, in float64."""
    x = random.normal(key(1), (rows, width), torch.float64) * torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=torch.float64)
    w = random.normal(key(2), (width,), torch.float64)
    y = (random.uniform(key(3), (rows,), torch.float64) < 0.7).double()
    p = torch.sigmoid(x @ w)
    return (p - y)[:, None] * x, x.t() @ ((p * (1 - p))[:, None] * x) / rows


def test_logistic_regression_in_closed_form() -> None:
    g, h = logistic()
    covariance = torch.cov(g.t())  # divided by n - 1
    noise = float((h @ covariance).trace())
    signal = float(g.mean(dim=0) @ h @ g.mean(dim=0)) - noise / len(g)
    found = noise_scale.curved_noise_scale(lambda w: w @ g, len(g), lambda v: h @ v)
    assert found.noise == pytest.approx(noise, rel=1e-10) and found.signal == pytest.approx(signal, rel=1e-9)
    assert found.batch == pytest.approx(noise / signal, rel=1e-9) or signal <= 0
    identity = noise_scale.curved_noise_scale(lambda w: w @ g, len(g), lambda v: v)  # H = 1: the simple noise scale
    mean_square, whole = float(g.square().sum() / len(g)), float(g.mean(dim=0).square().sum())
    simple = noise_scale.noise_scale_of_batches(mean_square, whole, 1, len(g))
    assert (identity.noise, identity.signal) == pytest.approx((simple.variance, simple.squared_norm), rel=1e-9)


def test_probes_have_the_exact_value_as_their_mean() -> None:
    g, h = logistic(rows=12)
    exact = noise_scale.curved_noise_scale(lambda w: w @ g, len(g), lambda v: h @ v)
    drawn = noise_scale.curved_noise_scale(lambda w: w @ g, len(g), lambda v: h @ v, key=KEY, probes=4000)
    assert drawn.noise == pytest.approx(exact.noise, rel=0.1)
    with pytest.raises(ValueError, match="want 2 rows"):
        noise_scale.curved_noise_scale(lambda w: w @ g, 1, lambda v: v)


def test_it_is_unbiased() -> None:
    """Over all samples of two out of a population with replacement, the mean estimate is the population's value."""
    g, h = logistic(rows=5)
    found = [
        noise_scale.curved_noise_scale(lambda w, rows=list(rows): w @ g[rows], 2, lambda v: h @ v)
        for rows in itertools.product(range(5), repeat=2)
    ]
    centred = g - g.mean(dim=0)
    covariance = centred.t() @ centred / len(g)  # of the population
    assert sum(one.noise for one in found) / 25 == pytest.approx(float((h @ covariance).trace()), rel=1e-10)
    assert sum(one.signal for one in found) / 25 == pytest.approx(float(g.mean(dim=0) @ h @ g.mean(dim=0)), rel=1e-9)


def test_of_a_model_it_is_that_of_its_rows() -> None:
    params, state, cfg = small_model("encoder.n_layers=1")
    batch = small_batch()
    each = per_example_gradients(params, state, batch, cfg, key=KEY)
    rows = [to_vector(tree_map(lambda leaf, row=row: leaf[row], each)) for row in range(3)]
    tokens = noise_scale.row_losses(params, state, batch, cfg, key=KEY)[1]
    g = torch.stack(rows) * (3 / float(tokens.sum()))
    product = as_product(params, lambda v: hessian_vector(params, state, batch, cfg, v, key=KEY))
    wanted = noise_scale.curved_noise_scale(lambda w: w @ g, 3, product)
    found = noise_scale.curved_noise_scale_of_examples(params, state, batch, cfg, key=KEY, probes=None, chunk=2)
    assert found[:2] == pytest.approx(wanted[:2], rel=1e-8)
