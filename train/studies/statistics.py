"""Means over seeds and their differences: bootstrap and Student intervals, paired and unpaired, and Holm's correction.

With few seeds the percentile bootstrap is too narrow (of three values it covers about three times in four, not 19 in
20), for it knows nothing beyond the values; Student's interval is wider and right for normal differences. Both are
given. Every function is deterministic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
_EXACT = 6  # values up to which all resamples are enumerated: 6**6 = 46,656
_RESAMPLES = 20_000
_STEPS = 400  # of the continued fraction, at the most

Interval = tuple[float, float]


class Difference(NamedTuple):
    """A difference of two means over seeds, or one mean against zero."""

    mean: float
    interval: Interval  # Student's, of level ``LEVEL``; NaN where there are too few values
    p: float  # of no difference, two-sided; NaN where there are too few values


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Percentile interval of the mean over resamples (Efron 1979): all of them up to six values, else 20,000."""
    sample = np.asarray(values, np.float64)
    count = len(sample)
    if count < 2:
        return math.nan, math.nan
    if count <= _EXACT:
        index = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        index = np.random.Generator(np.random.Philox(0)).integers(0, count, (_RESAMPLES, count))
    low, high = np.quantile(sample[index].mean(axis=1), ((1 - level) / 2, (1 + level) / 2)).tolist()
    return low, high


def paired(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Difference:
    """Mean of ``second - first``, pair by pair, with Student's t on the differences. Raises ``ValueError``."""
    if len(first) != len(second):
        raise ValueError(f"paired: {len(first)} values and {len(second)}; want pairs.")
    return _student(np.subtract(second, first), level)


def _student(differences: np.ndarray, level: float) -> Difference:
    count = len(differences)
    if count < 2:
        return Difference(float(differences.mean()) if count else math.nan, (math.nan, math.nan), math.nan)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    return _with_error(float(differences.mean()), error, count - 1, level)


def unpaired(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Difference:
    """Difference of the means, ``second - first``, by Welch's t: what one knows if the pairs are ignored."""
    sides = [np.asarray(side, np.float64) for side in (first, second)]
    mean = float(sides[1].mean() - sides[0].mean())
    if min(map(len, sides)) < 2:
        return Difference(mean, (math.nan, math.nan), math.nan)
    shares = [float(side.var(ddof=1)) / len(side) for side in sides]
    total = sum(shares)
    if total == 0:
        return _with_error(mean, 0.0, 1.0, level)
    freedom = total**2 / sum(share**2 / (len(side) - 1) for share, side in zip(shares, sides, strict=True))
    return _with_error(mean, math.sqrt(total), freedom, level)


def _with_error(mean: float, error: float, freedom: float, level: float) -> Difference:
    if error == 0:
        return Difference(mean, (mean, mean), 1.0 if mean == 0 else 0.0)
    reach = t_quantile(level, freedom) * error
    return Difference(mean, (mean - reach, mean + reach), t_p(mean / error, freedom))


def t_p(t: float, freedom: float) -> float:
    """Probability of ``|T| >= |t|`` for Student's t with ``freedom`` degrees: ``I_x(f/2, 1/2), x = f / (f + t^2)``."""
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def t_quantile(level: float, freedom: float) -> float:
    """The ``t`` that ``|T|`` exceeds with probability ``1 - level``, by bisection."""
    low, high = 0.0, 1.0
    while t_p(high, freedom) > 1 - level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function ``I_x(a, b)``, by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    """Lentz's evaluation of the continued fraction."""
    tiny = 1e-300
    upper, lower = 1.0, 1 - (a + b) * x / (a + 1)
    lower = 1 / (lower if abs(lower) > tiny else tiny)
    value = lower
    for m in range(1, _STEPS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            lower = 1 + term * lower
            lower = 1 / (lower if abs(lower) > tiny else tiny)
            upper = 1 + term / upper
            upper = upper if abs(upper) > tiny else tiny
            value *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return value


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: the k-th smallest of n times ``n - k + 1``, never below those before it.

    NaN stays NaN and does not count.
    """
    known = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    adjusted, least = [math.nan] * len(p), 0.0
    for rank, (value, place) in enumerate(known):
        least = max(least, min(1.0, value * (len(known) - rank)))
        adjusted[place] = least
    return adjusted
