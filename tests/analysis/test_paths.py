"""Lines and planes between models, and batch statistics against the activations themselves."""

from __future__ import annotations

import pytest
import torch

from nest_fn import key, loss
from nest_fn.analysis import paths, trees
from nest_fn.layers.tree import fill, flatten
from tests.analysis.models import small_batch, small_model

KEY = key(5)


def test_statistics_are_those_with_which_evaluation_repeats_training() -> None:
    """Over one batch, evaluation with recomputed statistics is the training mode without dropout, up to n / (n - 1)."""
    params, state, cfg = small_model(*paths._QUIET)
    batch = small_batch()
    fitting = paths.recompute_statistics(params, state, [batch], cfg, key=KEY)
    trained = loss(params, state, batch, cfg, key=KEY, train=True)[0]
    evaluated = loss(params, fitting, batch, cfg, key=KEY, train=False)[0]
    assert float(evaluated) == pytest.approx(float(trained), rel=1e-2)
    before = loss(params, state, batch, cfg, key=KEY, train=False)[0]
    assert abs(float(evaluated - trained)) < 0.2 * abs(float(before - trained))


def test_statistics_of_many_batches_are_the_mean_and_do_not_depend_on_the_old_ones() -> None:
    params, state, cfg = small_model()
    batches = [small_batch(seed=seed) for seed in (1, 2)]
    other = fill(state, {p: leaf * 3 + 1 if "running" in p else leaf for p, leaf in flatten(state).items()})
    both, again = (flatten(paths.recompute_statistics(params, s, batches, cfg, key=KEY)) for s in (state, other))
    each = [flatten(paths.recompute_statistics(params, state, [batch], cfg, key=KEY)) for batch in batches]
    for name in both:
        if "running" in name:
            torch.testing.assert_close(both[name], (each[0][name] + each[1][name]) / 2)
            torch.testing.assert_close(both[name], again[name])
    plain_model = small_model("encoder.conv_norm_type=layer_norm")
    assert paths.recompute_statistics(*plain_model[:2], batches, plain_model[2], key=KEY) is plain_model[1]


def test_a_line_ends_at_its_models_and_has_a_barrier() -> None:
    (a, state, cfg), (b, _, _) = (
        small_model("encoder.conv_norm_type=layer_norm"),
        small_model("encoder.conv_norm_type=layer_norm", seed=1),
    )
    batch = small_batch()
    curve = paths.loss_along_line((a, state), (b, state), batch, cfg, [0.0, 0.5, 1.0], key=KEY, chunk=2)
    for index, params in ((0, a), (1, paths.interpolate(a, b, 0.5)), (2, b)):
        wanted = loss(params, state, batch, cfg, key=KEY, train=False)[0]
        assert float(curve.loss[index]) == pytest.approx(float(wanted), rel=1e-9)
    assert curve.barrier == pytest.approx(
        max(0.0, float(curve.loss[1] - (curve.loss[0] + curve.loss[2]) / 2)), abs=1e-9
    )
    with pytest.raises(ValueError, match="0 and 1"):
        _ = paths.Curve((0.0, 0.5), torch.zeros(2)).barrier


def test_other_targets_are_refused() -> None:
    (a, state, cfg), (b, other, _) = small_model(), small_model(seed=1)
    with pytest.raises(ValueError, match="quantizer"):
        paths.loss_along_line((a, state), (b, other), small_batch(), cfg, [0.0], key=KEY)


def test_a_plane_goes_through_its_models() -> None:
    models = [small_model(seed=seed) for seed in (0, 1, 2)]
    (a, state, cfg), (b, _, _), (c, _, _) = models
    plane = paths.plane_through(a, b, c)
    for params, place in zip((a, b, c), plane.places, strict=True):
        assert float(trees.norm(trees.add_scaled(plane.at(*place), params, -1.0))) < 1e-9
    assert float(trees.dot(plane.first, plane.second)) == pytest.approx(0.0, abs=1e-12)
    assert float(trees.norm(plane.second)) == pytest.approx(1.0)
    batch = small_batch(2)
    grid = paths.loss_on_plane(plane, state, batch, cfg, [0.0, plane.places[1][0]], [0.0], key=KEY)
    line = paths.loss_along_line((a, state), (b, state), batch, cfg, [0.0, 1.0], key=KEY)
    torch.testing.assert_close(grid[0], line.loss)
    with pytest.raises(ValueError, match="one line"):
        paths.plane_through(a, b, paths.interpolate(a, b, 0.3))


def test_a_curve_goes_round_a_barrier() -> None:
    """``(x^2 + y^2 - 1)^2``: the line between (-1, 0) and (1, 0) crosses a hill, a curve stays in the valley."""

    def loss(point: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return (point["x"].square().sum() - 1).square()

    ends = [{"x": torch.tensor([x, 0.0], dtype=torch.float64)} for x in (-1.0, 1.0)]
    made = paths.train_curve(*ends, loss, key=KEY, steps=300, lr=0.1)
    again = paths.train_curve(*ends, loss, key=KEY, steps=300, lr=0.1)
    assert torch.equal(made.middle["x"], again.middle["x"]) and len(made.loss) == 300
    at = [index / 20 for index in range(21)]
    line, curve = (
        paths.Curve(tuple(at), torch.stack([loss(point, 0) for point in points]))
        for points in (
            [paths.interpolate(*ends, t) for t in at],
            [paths.bezier(ends[0], made.middle, ends[1], t) for t in at],
        )
    )
    assert line.barrier == pytest.approx(1.0) and curve.barrier < 0.08
    assert abs(float(made.middle["x"][1])) == pytest.approx(2.0, abs=0.3) and abs(float(made.middle["x"][0])) < 0.3


def test_the_middle_is_that_of_least_mean_loss() -> None:
    """For ``|p - c|^2`` it is ``(c / 3 - (a + b) / 10) / (2 / 15)``, where the gradient's integral over t is 0."""
    a, b, c = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0.0], [0.0, 2.0], [3.0, 3.0]))
    made = paths.train_curve(
        {"p": a}, {"p": b}, lambda tree, _: (tree["p"] - c).square().sum(), key=KEY, steps=2000, lr=0.1
    )
    torch.testing.assert_close(made.middle["p"], (c / 3 - (a + b) / 10) * 7.5, rtol=0.03, atol=0.1)
    for t, wanted in ((0.0, a), (1.0, b), (0.5, a / 4 + made.middle["p"] / 2 + b / 4)):
        torch.testing.assert_close(paths.bezier({"p": a}, made.middle, {"p": b}, t)["p"], wanted)
    with pytest.raises(ValueError, match="steps is 0"):
        paths.train_curve({"p": a}, {"p": b}, lambda *_: a.sum(), key=KEY, steps=0, lr=0.1)


def test_a_curve_between_models() -> None:
    (a, state, cfg), (b, _, _) = small_model("encoder.n_layers=1"), small_model("encoder.n_layers=1", seed=1)
    batch = small_batch(2)
    made = paths.connect((a, state), (b, state), [batch], cfg, key=KEY, steps=12, lr=0.02)
    points = [0.0, 0.5, 1.0]
    line = paths.loss_along_line((a, state), (b, state), batch, cfg, points, key=KEY)
    curve = paths.loss_along_curve((a, state), made.middle, (b, state), batch, cfg, points, key=KEY)
    torch.testing.assert_close(curve.loss[[0, 2]], line.loss[[0, 2]])
    assert float(curve.loss[1]) < float(line.loss[1])
