"""Similarity and spread of features: against definitions, invariances and closed forms."""

from __future__ import annotations

import pytest
import torch

from nest_fn import features, key
from nest_fn.analysis import representations as reps
from nest_fn.layers import random
from nest_fn.layers.tree import tree_map
from tests.analysis.models import small_batch, small_model


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(key(seed), shape, torch.float64)


def test_frames_are_those_of_the_utterances() -> None:
    params, state, cfg = small_model()
    batch = small_batch()
    frames, rows = reps.layer_frames(params, state, batch["audio"], batch["audio_len"], cfg)
    made, lengths = features(params, state, batch["audio"], batch["audio_len"], cfg)
    assert rows.tolist() == [row for row, count in enumerate(lengths.tolist()) for _ in range(count)]
    for layer, wanted in zip(frames, made, strict=True):
        torch.testing.assert_close(layer[rows == 1], wanted[1, : int(lengths[1])])
    mel = reps.mel_frames(batch["audio"], batch["audio_len"], lengths, made[0].shape[1], cfg)
    assert mel.shape == (len(rows), 8 * 80)


def test_hsic_is_the_mean_over_all_distinct_quadruples() -> None:
    """The U-statistic by its definition, for 6 points (Song et al. 2012, equation 4)."""
    from itertools import permutations

    x, y = normal(1, 6, 2), normal(2, 6, 3)
    k, m = x @ x.t(), y @ y.t()
    terms = [k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c]) for a, b, c, d in permutations(range(6), 4)]
    assert float(reps.unbiased_hsic(k, m)) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-9)
    with pytest.raises(ValueError, match="4 or more"):
        reps.unbiased_hsic(k[:3, :3], m[:3, :3])


def test_cka_is_one_up_to_rotation_and_near_zero_by_chance() -> None:
    x, other = normal(1, 400, 8), normal(2, 400, 8)
    rotation = torch.linalg.qr(normal(3, 8, 8)).Q
    first, second = [x], [3 * x @ rotation + 5, other]
    pairs = zip(reps.minibatches(first, 50, key(4)), reps.minibatches(second, 50, key(4)), strict=True)
    found = reps.minibatch_cka(pairs)
    assert float(found[0, 0]) == pytest.approx(1.0)
    assert abs(float(found[0, 1])) < 0.05
    whole = reps.minibatch_cka([(first, second)])
    assert float((found - whole).abs().max()) < 0.05
    with pytest.raises(ValueError, match="no minibatch"):
        reps.minibatch_cka([])


def test_cka_of_large_samples_is_kornbliths() -> None:
    """``|Y'X|^2 / (|X'X| |Y'Y|)`` of centred features, from which the unbiased one differs by O(1/n)."""
    x = normal(1, 1500, 5)
    y = torch.cat((x[:, :2] + 0.5 * normal(2, 1500, 2), normal(3, 1500, 2)), dim=1)
    a, b = x - x.mean(0), y - y.mean(0)
    wanted = (b.t() @ a).square().sum() / ((a.t() @ a).norm() * (b.t() @ b).norm())
    assert float(reps.minibatch_cka([([x], [y])])[0, 0]) == pytest.approx(float(wanted), abs=0.01)


def test_effective_rank_counts_equal_directions() -> None:
    orthogonal = torch.linalg.qr(normal(1, 50, 10)).Q
    assert float(reps.rank_me(orthogonal)) == pytest.approx(10.0, rel=1e-4)
    assert float(reps.rank_me(torch.outer(normal(1, 50), normal(2, 10)))) == pytest.approx(1.0, abs=1e-3)
    p = torch.tensor([3.0, 1.0], dtype=torch.float64) / 4
    uneven = orthogonal[:, :2] * torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert float(reps.rank_me(uneven)) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-5)


def test_isotropy_by_its_definition() -> None:
    x = normal(1, 60, 4) + 0.7
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    off = ~torch.eye(60, dtype=torch.bool)
    assert reps.isotropy(x).mean_cosine == pytest.approx(float(cosines[off].mean()), rel=1e-9)
    even = torch.cat((torch.eye(5), -torch.eye(5))).double()
    assert reps.isotropy(even).partition == pytest.approx(1.0)
    assert reps.isotropy(even).mean_cosine == pytest.approx(-1 / 9)
    assert reps.isotropy(x + 10).partition < 0.5
    with pytest.raises(ValueError, match="2 or more"):
        reps.isotropy(x[:1])


def test_canonical_correlations_by_construction_and_by_least_squares() -> None:
    n = 4000
    x, noise = normal(1, n, 3), normal(2, n, 2)
    y = torch.stack((0.8 * x[:, 0] + 0.6 * noise[:, 0], noise[:, 1]), dim=1) @ normal(5, 2, 2)
    sums = reps.moments(x[:1000], y[:1000]).add(reps.moments(x[1000:], y[1000:]))
    found = reps.canonical_correlations(sums, ridge=0.0)
    assert float(found.values[0]) == pytest.approx(0.8, abs=0.02)
    assert float(found.values[1]) < 0.06
    # One column: the canonical correlation is the multiple correlation of least squares.
    a, b = x - x.mean(0), (y - y.mean(0))[:, :1]
    fitted = a @ torch.linalg.lstsq(a, b).solution
    wanted = torch.corrcoef(torch.stack((fitted[:, 0], b[:, 0])))[0, 1]
    one = reps.canonical_correlations(reps.moments(x, y[:, :1]), ridge=0.0)
    assert float(one.values[0]) == pytest.approx(float(wanted), rel=1e-9)
    same = reps.canonical_correlations(reps.moments(x, x @ normal(6, 3, 3)), ridge=0.0)
    assert same.mean == pytest.approx(1.0)
    assert same.weighted == pytest.approx(1.0)


def test_a_layers_features_of_another_scale_have_the_same_similarity() -> None:
    params, state, cfg = small_model()
    batch = small_batch()
    frames, _ = reps.layer_frames(params, state, batch["audio"], batch["audio_len"], cfg)
    found = reps.minibatch_cka([(frames, tree_map(lambda x: 2 * x, frames))])
    torch.testing.assert_close(found.diagonal(), torch.ones(len(frames), dtype=torch.float64))
    torch.testing.assert_close(found, found.t())
