"""Intervals, p-values and corrections against scipy, enumeration and published numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nest_fn.train.studies.statistics import (
    bootstrap_interval,
    holm,
    incomplete_beta,
    paired,
    t_p,
    t_quantile,
    unpaired,
)

FIRST = [3.1, 2.9, 3.4, 3.0, 3.3]
SECOND = [2.8, 2.7, 3.2, 2.6, 3.25]


@pytest.mark.parametrize("freedom, point", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (120, 1.97993)])
def test_quantiles_are_those_of_the_printed_tables(freedom: float, point: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(point, rel=2e-6)
    assert t_p(t_quantile(0.95, freedom), freedom) == pytest.approx(0.05, rel=1e-9)


def test_closed_forms() -> None:
    for t in (0.0, 0.3, 2.0, 30.0):
        assert t_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)  # Cauchy
        assert t_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-14)
    for x in (0.0, 0.2, 0.7, 1.0):
        assert incomplete_beta(1, 1, x) == pytest.approx(x)
        assert incomplete_beta(3, 1, x) == pytest.approx(x**3)
        assert incomplete_beta(2.5, 0.7, x) == pytest.approx(1 - incomplete_beta(0.7, 2.5, 1 - x), abs=1e-14)


def test_against_scipy() -> None:
    stats, special = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.special")
    for a, b, x in itertools.product((0.5, 1.3, 8.0, 60.0), (0.5, 2.0, 33.0), (1e-6, 0.1, 0.5, 0.93)):
        assert incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-11, abs=1e-300)
    with_pairs, without = stats.ttest_rel(SECOND, FIRST), stats.ttest_ind(SECOND, FIRST, equal_var=False)
    for ours, theirs in ((paired(FIRST, SECOND), with_pairs), (unpaired(FIRST, SECOND), without)):
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)
        assert ours.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)
    many = np.random.Generator(np.random.Philox(3)).normal(size=40)
    theirs = stats.bootstrap((many,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(1))
    assert bootstrap_interval(many.tolist()) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_the_bootstrap_of_few_values_is_exact() -> None:
    sample = [1.0, 2.0, 4.0]
    means = [np.mean(drawn) for drawn in itertools.product(sample, repeat=3)]
    assert bootstrap_interval(sample) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))
    assert bootstrap_interval(list(range(30))) == bootstrap_interval(list(range(30)))  # no hidden draw
    assert all(map(math.isnan, bootstrap_interval([1.0])))


def test_pairing_helps_where_seeds_move_all_arms_alike() -> None:
    seeds = np.random.Generator(np.random.Philox(1)).normal(0, 1, 8)
    noise = np.random.Generator(np.random.Philox(2)).normal(0, 0.01, 8)
    first, second = seeds.tolist(), (seeds + 0.1 + noise).tolist()
    with_pairs, without = paired(first, second), unpaired(first, second)
    assert with_pairs.mean == pytest.approx(without.mean)
    assert with_pairs.p < 1e-6 < 0.5 < without.p
    assert (without.interval[1] - without.interval[0]) > 50 * (with_pairs.interval[1] - with_pairs.interval[0])


def test_the_interval_covers_as_often_as_it_says() -> None:
    draw = np.random.Generator(np.random.Philox(5))
    covered = sum(
        low <= 0 <= high for low, high in (paired([0.0] * 4, draw.normal(size=4)).interval for _ in range(400))
    )
    assert 400 * 0.95 - 3 * 4.4 <= covered <= 400 * 0.95 + 3 * 4.4  # three standard deviations of a binomial


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's procedure by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    found = holm([math.nan, 0.02, math.nan])
    assert found[1] == 0.02 and math.isnan(found[0]) and math.isnan(found[2])


def test_edges() -> None:
    assert paired([1.0, 1.0], [1.0, 1.0]) == (0.0, (0.0, 0.0), 1.0)
    assert paired([1.0, 2.0], [2.0, 3.0]) == (1.0, (1.0, 1.0), 0.0)
    assert unpaired([1.0, 1.0], [1.0, 1.0]) == (0.0, (0.0, 0.0), 1.0)
    assert math.isnan(paired([1.0], [2.0]).p) and paired([1.0], [2.0]).mean == 1.0
    assert math.isnan(unpaired([1.0], [2.0]).p)
    with pytest.raises(ValueError, match="want pairs"):
        paired([1.0], [1.0, 2.0])
