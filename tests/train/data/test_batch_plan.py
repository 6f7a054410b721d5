"""The batch plan: nothing lost or repeated, one for all rank counts, static shapes, little padding.

Faults F5; levels R1, R2.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nest_fn.config.training import DataConfig
from nest_fn.train.data.batch_plan import Plan, PlannedBatch, plan_epoch, plan_stream
from nest_fn.train.data.buckets import Shapes, batch_counts, choose_shapes
from nest_fn.train.errors import UsageError
from nest_fn.train.hash_rng import utterance_hashes

lengths_of = st.lists(st.integers(1, 60 * 16000), min_size=1, max_size=120).map(lambda v: np.array(v, np.int64))
configs = st.builds(
    DataConfig,
    batch_seconds=st.sampled_from([240.0, 300.0, 900.0]),
    max_batch_size=st.sampled_from([4, 7, 256]),
    num_buckets=st.integers(1, 6),
    row_multiple=st.sampled_from([1, 2, 4]),
)


def _hashes(count: int) -> NDArray[np.int64]:
    return utterance_hashes(f"u{number}" for number in range(count))


def _plan(lengths: NDArray[np.int64], config: DataConfig | None = None, **options: Any) -> Plan:
    shapes = choose_shapes(lengths, config or DataConfig())
    return plan_epoch(lengths, _hashes(len(lengths)), shapes, **{"seed": 0, "epoch": 0} | options)


def _same(a: PlannedBatch, b: PlannedBatch) -> bool:
    return a.width == b.width and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("row", "index", "copy"))


def _simulated(seed: int = 0) -> NDArray[np.int64]:
    seconds = np.exp(np.random.Generator(np.random.Philox(seed)).normal(np.log(12.0), 0.6, 60_000))
    return np.round(seconds[(seconds >= 1) & (seconds <= 35)][:20_000] * 16000).astype(np.int64)


@given(lengths_of, configs, st.booleans(), st.integers(0, 2**40), st.integers(0, 5))
def test_a_plan_is_a_permutation_in_static_shapes(
    lengths: NDArray[np.int64], config: DataConfig, shuffle: bool, seed: int, epoch: int
) -> None:
    plan = _plan(lengths, config, seed=seed, epoch=epoch, shuffle=shuffle)
    shapes = {(int(w), int(r)) for w, r in zip(plan.shapes.width, plan.shapes.rows, strict=True)}
    seen: list[int] = []
    for batch in plan:
        assert (batch.width, len(batch.row)) in shapes
        assert np.array_equal(batch.row, np.arange(len(batch.row)))
        held = batch.index[batch.index >= 0]
        assert len(held) and (lengths[held] <= batch.width).all()
        seen += held.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    assert len(shapes) <= config.num_buckets
    for width, rows in shapes:
        assert rows % config.row_multiple == 0 and rows <= config.max_batch_size
        assert (rows - config.row_multiple) * width < config.batch_seconds * 16000
        assert (width + 160) % 2560 == 0 and (width < 61440 or (width + 160) % 10240 == 0)
    assert plan.padded_samples == sum(batch.width * len(batch.row) for batch in plan)


@given(lengths_of, configs, st.integers(1, 5))
def test_ranks_share_the_same_batches(lengths: NDArray[np.int64], config: DataConfig, world: int) -> None:
    plan = _plan(lengths, config)
    for batch in plan:
        parts = [batch.part(rank, world) for rank in range(world)]
        assert len({(part.width, len(part.row)) for part in parts}) == 1
        rows = np.concatenate([part.row for part in parts])
        index = np.concatenate([part.index for part in parts])[np.argsort(rows)]
        assert np.array_equal(np.sort(rows), np.arange(len(rows)))
        assert np.array_equal(index[: len(batch.index)], batch.index) and (index[len(batch.index) :] == -1).all()
        assert len(rows) - len(batch.row) < world
        if len(batch.row) % world == 0:
            assert len(rows) == len(batch.row)


@given(lengths_of, configs, st.data())
def test_first_k_and_the_rest_are_all(lengths: NDArray[np.int64], config: DataConfig, data: st.DataObject) -> None:
    shapes, hashes = choose_shapes(lengths, config), _hashes(len(lengths))
    size = len(plan_epoch(lengths, hashes, shapes, seed=3, epoch=0))
    whole = list(itertools.islice(plan_stream(lengths, hashes, shapes, seed=3), 2 * size))
    assert [(epoch, batch) for epoch, batch, _ in whole[: size + 1]] == [*((0, b) for b in range(size)), (1, 0)]
    k = data.draw(st.integers(0, 2 * size - 1))
    epoch, batch = (whole[k - 1][0], whole[k - 1][1] + 1) if k else (0, 0)  # one past the last one seen
    rest = plan_stream(lengths, hashes, shapes, seed=3, epoch=epoch, batch=batch)
    for (_, _, one), (_, _, two) in zip(whole[k:], rest, strict=False):
        assert _same(one, two)


def test_positions_that_do_not_exist() -> None:
    lengths = np.full(10, 16000)
    with pytest.raises(ValueError, match="has 1 batches"):
        next(plan_stream(lengths, _hashes(10), choose_shapes(lengths, DataConfig()), seed=0, batch=2))
    with pytest.raises(ValueError, match="negative"):
        next(plan_stream(lengths, _hashes(10), choose_shapes(lengths, DataConfig()), seed=0, epoch=-1))
    with pytest.raises(IndexError):
        _plan(lengths).batch(1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _plan(lengths).batch(0).part(2, 2)


def test_seed_and_epoch_change_the_order_and_nothing_else() -> None:
    lengths = _simulated()[:2000]
    plans = [_plan(lengths, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert np.array_equal(plans[0].index, plans[1].index) and np.array_equal(plans[0].shape, plans[1].shape)
    for other in plans[2:]:
        assert (other.index == plans[0].index).mean() < 0.05
        assert Counter(other.shape.tolist()) == Counter(plans[0].shape.tolist())


def test_the_plan_is_frozen() -> None:
    """A plan must never change under a checkpoint: these numbers may only change with the format's version."""
    lengths = np.arange(1, 41) * 16000 % 560_000 + 16_000
    plan = _plan(lengths, DataConfig(num_buckets=4, batch_seconds=100.0), seed=7, epoch=2)
    assert plan.shapes.width.tolist() == [112480, 276320, 419680, 563040]
    assert plan.shapes.rows.tolist() == [7, 2, 1, 1]
    assert (len(plan), plan.batch(0).index.tolist(), plan.batch(1).index.tolist()) == FROZEN


FROZEN = (25, [16], [19])


def test_shuffled_is_uniform() -> None:
    """Where each of 8 utterances lands in 2000 epochs: a chi-square test over the table."""
    lengths, shapes, places = np.full(8, 16000), Shapes(np.array([17760]), np.array([8])), np.zeros((8, 8))
    for epoch in range(2000):
        order = plan_epoch(lengths, _hashes(8), shapes, seed=0, epoch=epoch).index
        places[np.arange(8), np.argsort(order)] += 1
    assert ((places - 250) ** 2 / 250).sum() < 49 + 5 * np.sqrt(2 * 49)


def test_without_shuffling_the_order_is_kept_and_the_widest_comes_first() -> None:
    lengths = np.array([1, 30, 2, 31, 3, 32]) * 16000
    plan = _plan(lengths, DataConfig(num_buckets=2), shuffle=False)
    assert [batch.index[batch.index >= 0].tolist() for batch in plan] == [[1, 3, 5], [0, 2, 4]] or len(plan) == 1
    assert plan.largest() == 0


@pytest.mark.parametrize("seconds, least", [(240.0, 0.95), (1200.0, 0.945)])
def test_little_padding_on_20_000_utterances(seconds: float, least: float) -> None:
    lengths = _simulated()
    assert len(lengths) == 20_000
    assert _plan(lengths, DataConfig(batch_seconds=seconds)).efficiency(lengths) >= least
    assert _plan(lengths, DataConfig(batch_seconds=seconds, num_buckets=8)).efficiency(lengths) >= 0.87


def test_widths_are_the_best_there_are() -> None:
    """Against all choices of 3 of 9 widths, tried one by one."""
    lengths = np.array([*range(5, 95, 7)] * 3 + [90] * 20) * 10240 - 5000
    config = DataConfig(num_buckets=3, batch_seconds=1e6, max_batch_size=1, max_duration=1e4)  # no empty rows
    candidates = np.unique(-(-(lengths + 160) // 10240)) * 10240 - 160
    costs = [
        np.take(choice, np.searchsorted(choice, lengths)).sum()
        for choice in map(np.array, itertools.combinations(candidates, 3))
        if choice[-1] == candidates[-1]
    ]
    shapes = choose_shapes(lengths, config)
    assert shapes.width[shapes.bucket(lengths)].sum() == min(costs)


@settings(max_examples=50)
@given(lengths_of, configs)
def test_batches_are_foretold(lengths: NDArray[np.int64], config: DataConfig) -> None:
    plan = _plan(lengths, config)
    counts = np.bincount(plan.shapes.bucket(lengths), minlength=len(plan.shapes.width))
    assert batch_counts(plan.shapes, counts) == np.bincount(plan.shape, minlength=len(counts)).tolist()


def test_a_budget_that_is_too_small_says_so() -> None:
    with pytest.raises(UsageError, match="cannot hold 4 rows of the longest utterance, 30.00 s"):
        _plan(np.array([30 * 16000]), DataConfig(batch_seconds=100.0, row_multiple=4))
    with pytest.raises(UsageError, match="max_batch_size 3 is below row_multiple 4"):
        _plan(np.array([16000]), DataConfig(max_batch_size=3, row_multiple=4))
    one = _plan(np.array([30 * 16000]), DataConfig(batch_seconds=30.0))
    assert len(one) == 1 and one.shapes.rows.tolist() == [1]


def test_an_hour_among_seconds_is_planned_quickly() -> None:
    lengths = np.concatenate([_simulated()[:500], [3600 * 16000]])
    plan = _plan(lengths, DataConfig(batch_seconds=4000.0))
    assert plan.batch(plan.largest()).width >= 3600 * 16000


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.7, 3.0]), min_size=1, max_size=40), st.integers(0, 3))
def test_weights_over_epochs(weights: list[float], seed: int) -> None:
    weight = np.array(weights)
    lengths, hashes = np.full(len(weights), 16000), _hashes(len(weights))
    shapes = Shapes(np.array([17760]), np.array([4]))
    total = np.zeros(len(weights))
    for epoch in range(8):
        plan = plan_epoch(lengths, hashes, shapes, seed=seed, epoch=epoch, weight=weight)
        pairs = list(zip(plan.index.tolist(), plan.copy.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        total += np.bincount(plan.index, minlength=len(weights))
        assert len(plan.index) == pytest.approx(weight.sum(), abs=len(set(weights)) + 1)
        for batch in plan:
            assert ((batch.index >= 0) | (batch.copy == 0)).all()
    assert (np.abs(total - 8 * weight) <= 1).all()
