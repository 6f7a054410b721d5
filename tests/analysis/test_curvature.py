"""Curvature: against finite differences of float64, and dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn import forward, key, loss
from nest_fn.analysis import curvature, trees
from nest_fn.layers import random
from nest_fn.layers.tree import flatten, tree_map
from tests.analysis.models import small_batch, small_model

KEY = key(5)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own jvp


def direction(params: Any, seed: int = 7) -> Any:
    return trees.normal_like(key(seed), params)


def moved(params: Any, along: Any, step: float) -> Any:
    return trees.add_scaled(params, along, step)


def assert_trees_close(found: Any, wanted: Any, rtol: float) -> None:
    assert float(trees.norm(trees.add_scaled(found, wanted, -1.0)) / trees.norm(wanted)) < rtol


def test_gradient_and_hessian_are_slopes() -> None:
    params, state, cfg = small_model()
    batch, v = small_batch(), direction(params)

    def gradient(p: Any) -> Any:
        return curvature.gradient(p, state, batch, cfg, key=KEY, chunk=2)

    ends = [loss(moved(params, v, step), state, batch, cfg, key=KEY, train=False)[0] for step in (1e-6, -1e-6)]
    assert float(trees.dot(gradient(params), v)) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-5)
    found = curvature.hessian_vector(params, state, batch, cfg, v, key=KEY, chunk=2)
    ahead, behind = gradient(moved(params, v, 1e-5)), gradient(moved(params, v, -1e-5))
    assert_trees_close(found, trees.scaled(trees.add_scaled(ahead, behind, -1.0), 1 / 2e-5), 1e-4)


def test_gauss_newton_is_the_variance_of_the_slopes_of_the_log_probabilities() -> None:
    """``v^T G v = mean_t sum_c p_c (d log p_c / dv)^2``, by finite differences; and G is symmetric."""
    params, state, cfg = small_model("num_books=2")
    batch, v, u = small_batch(), direction(params), direction(params, 8)
    ends = [forward(moved(params, v, step), state, batch, cfg, key=KEY)[0].log_probs for step in (1e-6, -1e-6)]
    output, _ = forward(params, state, batch, cfg, key=KEY)
    slopes = (ends[0] - ends[1]) / 2e-6
    by_token = (output.log_probs.exp() * slopes.square()).sum(dim=2)
    mask = curvature.counted_tokens(output.masks[:, 0] > 0.5, output.encoded_len, by_token.shape[1], None, cfg)
    products = [curvature.gauss_newton_vector(params, state, batch, cfg, w, key=KEY, chunk=2) for w in (v, u)]
    assert float(trees.dot(v, products[0])) == pytest.approx(float(by_token[mask].mean()), rel=1e-6)
    assert float(trees.dot(u, products[0])) == pytest.approx(float(trees.dot(v, products[1])), rel=1e-9)


def symmetric(size: int) -> torch.Tensor:
    matrix = random.normal(key(3), (size, size), torch.float64)
    return matrix + matrix.t()


def test_lanczos_finds_the_largest_eigenvalues() -> None:
    matrix = symmetric(40)
    found = curvature.top_eigenvalues(lambda v: (matrix @ v.double()).to(v), 40, key=KEY, steps=40, count=3)
    wanted = torch.linalg.eigvalsh(matrix).flip(0)[:3]
    torch.testing.assert_close(found.values, wanted, rtol=1e-5, atol=1e-5)
    for value, vector in zip(found.values, found.vectors.double(), strict=True):
        torch.testing.assert_close(matrix @ vector, value * vector, rtol=0, atol=2e-4)


def test_lanczos_stops_where_the_space_ends_and_its_bounds_hold() -> None:
    diagonal = torch.tensor([3.0, 3.0, -1.0, -1.0, -1.0], dtype=torch.float64)  # two eigenvalues: two steps
    tri = curvature.lanczos(lambda v: diagonal * v, torch.ones(5, dtype=torch.float64), 5)
    assert len(tri.diagonal) == 2
    matrix = symmetric(60)
    few = curvature.top_eigenvalues(lambda v: (matrix @ v.double()).to(v), 60, key=KEY, steps=8, count=2)
    true = torch.linalg.eigvalsh(matrix)
    for value, bound in zip(few.values, few.bounds, strict=True):
        assert float((true - value).abs().min()) <= float(bound) + 1e-4
    with pytest.raises(ValueError, match="1 or more"):
        curvature.lanczos(lambda v: v, torch.ones(2), 0)


def test_quadrature_is_exact_for_moments_and_estimates_the_trace() -> None:
    matrix = symmetric(50)
    start = random.normal(random.split(KEY, 1)[0], (50,)).double()
    start = start / start.norm()
    found = curvature.spectral_density(lambda v: (matrix @ v.double()).to(v), 50, key=KEY, steps=6, starts=1)
    for power in range(4):
        wanted = float(start @ torch.linalg.matrix_power(matrix, power) @ start)
        assert float((found.weights * found.nodes**power).sum()) == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    grid = torch.linspace(-60, 60, 4001, dtype=torch.float64)
    area = torch.trapezoid(found.density(grid, 0.5), grid)
    assert float(area) == pytest.approx(1.0, abs=1e-6)


def test_ascent_raises_the_loss_as_the_gradient_says() -> None:
    params, state, cfg = small_model()
    batch = small_batch()
    slope = float(trees.norm(curvature.gradient(params, state, batch, cfg, key=KEY)))
    found = curvature.ascent_sharpness(params, state, batch, cfg, key=KEY, radius=1e-6)
    assert float(found) == pytest.approx(1e-6 * slope, rel=1e-3)


def test_fisher_diagonal_is_the_mean_of_squared_gradients() -> None:
    params, state, cfg = small_model()
    batch = small_batch()
    from nest_fn.analysis.gradients import per_example_gradients

    found = curvature.fisher_diagonal(params, state, batch, cfg, key=KEY, labels="data", chunk=2)
    each = per_example_gradients(params, state, batch, cfg, key=KEY)
    tokens = curvature.mean_loss(params, state, batch, cfg, key=KEY)[1]
    wanted = tree_map(lambda leaf: leaf.square().sum(dim=0) / tokens, each)
    assert_trees_close(found, wanted, 1e-9)


def test_fisher_diagonal_of_the_model_agrees_with_gauss_newton() -> None:
    """Over many draws of the labels, by the bias of one class of the decoder: ``mean p (1 - p)``."""
    params, state, cfg = small_model()
    batch = small_batch(2)
    draws = [
        flatten(curvature.fisher_diagonal(params, state, batch, cfg, key=one))["decoder.bias"]
        for one in random.split(KEY, 24)
    ]
    output, _ = forward(params, state, batch, cfg, apply_mask=False)
    p = output.log_probs[..., 0].exp() if output.log_probs.ndim == 4 else output.log_probs.exp()
    wanted = (p * (1 - p)).mean()
    assert float(torch.stack(draws).mean()) == pytest.approx(float(wanted), rel=0.25)


def test_vectors_and_trees() -> None:
    params, _, _ = small_model()
    flat = trees.to_vector(params)
    back = trees.from_vector(flat, params)
    assert all(torch.equal(a, b) for a, b in zip(flatten(back).values(), flatten(params).values(), strict=True))
    assert float(trees.norm(params)) == pytest.approx(float(flat.norm()))
    with pytest.raises(ValueError, match="elements"):
        trees.from_vector(flat[1:], params)
