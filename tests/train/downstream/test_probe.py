"""The linear probe against oracles: a known separation, torch's own optimum of the same objective, and leakage."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nest_fn.train.downstream.linear_probe import (
    UNKNOWN,
    accuracy,
    choose,
    fit_linear_probe,
    frame_labels,
    logits,
    mean_pool,
    stack_frames,
)


def gaussian_classes(n: int, classes: int, width: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labelled rows around fixed class centres, on axes of very different scale and offset."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=rng)
    x = centres[y] + spread * torch.randn(n, width, generator=rng)
    return x * torch.logspace(-2, 2, width) + 50.0, y


def test_recovers_a_known_linear_separation() -> None:
    x, y = gaussian_classes(600, 5, 12, spread=0.3, seed=1)
    params = fit_linear_probe(x, y, 5, penalty=1e-3)
    fresh_x, fresh_y = gaussian_classes(600, 5, 12, spread=0.3, seed=2)
    assert accuracy(params, fresh_x, fresh_y) > 0.99
    shuffled = fresh_y[torch.randperm(600, generator=torch.Generator().manual_seed(3))]
    assert accuracy(params, fresh_x, shuffled) < 0.35  # and labels without meaning are at chance


def test_reaches_the_optimum_that_gradient_descent_reaches() -> None:
    x, y = gaussian_classes(200, 4, 6, spread=1.5, seed=1)
    x, penalty = x.double(), 0.05
    params = fit_linear_probe(x, y, 4, penalty=penalty)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    layer = torch.nn.Linear(6, 4, dtype=torch.float64)
    for _ in range(4000):
        loss = F.cross_entropy(layer(z), y) + 0.5 * penalty * layer.weight.square().sum()
        layer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.5 * p.grad
    torch.testing.assert_close(params["weight"], layer.weight.detach(), atol=2e-4, rtol=0)
    torch.testing.assert_close(logits(params, x).softmax(1), layer(z).softmax(1).detach(), atol=2e-4, rtol=0)


def test_gradient_of_the_objective_vanishes_and_fit_is_repeatable() -> None:
    x, y = gaussian_classes(300, 6, 20, spread=1.0, seed=4)
    params = fit_linear_probe(x, y, 6, penalty=0.01)
    again = fit_linear_probe(x, y, 6, penalty=0.01)
    assert all(torch.equal(params[name], again[name]) for name in params)
    z = (x - params["mean"]) / params["scale"]
    residual = (logits(params, x).softmax(1) - F.one_hot(y, 6)) / len(y)
    gradient = residual.T @ z + 0.01 * params["weight"]
    assert gradient.abs().max() < 1e-4
    assert residual.sum(0).abs().max() < 1e-4  # the bias is free of penalty


def test_statistics_come_from_the_training_rows_alone() -> None:
    x, y = gaussian_classes(100, 3, 5, spread=0.5, seed=1)
    params = fit_linear_probe(x, y, 3, penalty=0.01)
    torch.testing.assert_close(params["mean"], x.mean(0))
    torch.testing.assert_close(params["scale"], x.std(0, correction=0))
    other = torch.cat([x[:50], 1e6 + x[50:]])  # rows are scored one by one, whatever else is in the test set
    torch.testing.assert_close(logits(params, other)[:50], logits(params, x)[:50])


def test_constant_features_do_no_harm() -> None:
    x, y = gaussian_classes(200, 3, 5, spread=0.2, seed=1)
    x = torch.cat([x, torch.full((200, 1), 7.0)], dim=1)
    params = fit_linear_probe(x, y, 3, penalty=0.01)
    assert all(torch.isfinite(value).all() for value in params.values())
    assert accuracy(params, x, y) > 0.95


def test_penalty_is_chosen_on_held_back_speakers() -> None:
    """Features that can be learnt by heart, but mean nothing for a speaker not seen, call for a stiff penalty."""
    rng = torch.Generator().manual_seed(0)
    groups = torch.arange(16).repeat_interleave(20)
    y = torch.randint(2, (320,), generator=rng)
    honest = 2.0 * (y[:, None] - 0.5) + 1.6 * torch.randn(320, 1, generator=rng)
    private = torch.randn(320, 120, generator=rng)  # room to learn the seen rows by heart
    x = torch.cat([honest, private], dim=1)
    assert choose([x], y, 2, groups, penalties=(1.0, 1e-5)).penalty == 1.0
    tight = fit_linear_probe(x, y, 2, groups=groups)
    fresh_y = torch.randint(2, (2000,), generator=rng)
    fresh = torch.cat(
        [
            2.0 * (fresh_y[:, None] - 0.5) + 1.6 * torch.randn(2000, 1, generator=rng),
            torch.randn(2000, 120, generator=rng),
        ],
        dim=1,
    )
    assert accuracy(tight, fresh, fresh_y) >= accuracy(fit_linear_probe(x, y, 2, penalty=1e-5), fresh, fresh_y)


def test_layer_is_chosen_on_held_back_speakers() -> None:
    """By heart beats by sense on the seen rows; the layer that carries over to other speakers must win."""
    x, y = gaussian_classes(320, 4, 8, spread=0.8, seed=1)
    groups = torch.arange(8).repeat_interleave(40)
    void = torch.randn(320, 400, generator=torch.Generator().manual_seed(0))
    choice = choose([void, x, void], y, 4, groups)
    assert choice.layer == 1
    assert 0.7 < choice.accuracy <= 1.0
    assert accuracy(fit_linear_probe(void, y, 4, penalty=1e-3), void, y) > 0.99


def test_choice_does_not_see_the_held_back_rows_while_fitting() -> None:
    """With labels of held-back speakers replaced, the fitted probe is the same, so its accuracy is at chance."""
    x, y = gaussian_classes(400, 4, 8, spread=0.2, seed=1)
    groups = torch.arange(8).repeat_interleave(50)
    held = torch.isin(groups, torch.tensor([1, 5]))
    wrong = torch.where(held, (y + 1) % 4, y)
    assert choose([x], y, 4, groups).accuracy > 0.98
    assert choose([x], wrong, 4, groups).accuracy < 0.02


def test_frame_labels_take_the_majority() -> None:
    phones = [("sil", 0.0, 0.10), ("a", 0.10, 0.13), ("b", 0.13, 0.15), ("a", 0.15, 0.17), ("b", 0.17, 0.24)]
    labels = frame_labels(phones, 4, ["sil", "a", "b"])
    assert labels.tolist() == [0, 1, 2, UNKNOWN]  # a: 30 + 10 ms, sil 20 and b 20 in the second frame
    assert frame_labels(phones, 2, ["sil", "a", "b"], seconds_per_frame=0.12).tolist() == [0, 2]
    assert frame_labels([], 2, ["sil"]).tolist() == [UNKNOWN, UNKNOWN]
    with pytest.raises(ValueError, match=r"phones \['b'\] are not among the 2 names"):
        frame_labels(phones, 4, ["sil", "a"])


def test_a_tie_goes_to_the_first_name() -> None:
    halves = [("b", 0.8, 0.84), ("a", 0.84, 0.88)]
    assert frame_labels(halves, 11, ["a", "b"])[10] == 0
    assert frame_labels(halves, 11, ["b", "a"])[10] == 0


def test_stacking_is_frame_major_and_drops_the_rest() -> None:
    features = torch.arange(2 * 3 * 17.0).reshape(2, 3, 17)
    stacked = stack_frames(features, 8)
    assert stacked.shape == (2, 2, 24)
    assert torch.equal(stacked[1, 1, 3:6], features[1, :, 9])


def test_mean_pool_ignores_padding() -> None:
    x = torch.randn(2, 5, 3)
    x[1, 2:] = float("nan")
    torch.testing.assert_close(mean_pool(x, torch.tensor([5, 2])), torch.stack([x[0].mean(0), x[1, :2].mean(0)]))


def test_errors_say_what_came() -> None:
    x, y = torch.zeros(4, 3), torch.tensor([0, 1, 2, -1])
    with pytest.raises(ValueError, match=r"labels in \[0, 3\)"):
        fit_linear_probe(x, y, 3, penalty=0.1)
    with pytest.raises(ValueError, match=r"got \[\[4, 3\], \[3\], None\]"):
        fit_linear_probe(x, y[:3], 3, penalty=0.1)
    with pytest.raises(ValueError, match="give groups="):
        fit_linear_probe(x, y.clamp(min=0), 3)
    with pytest.raises(ValueError, match="1 group of rows"):
        fit_linear_probe(x, y.clamp(min=0), 3, groups=torch.zeros(4, dtype=torch.int64))
