"""Codes: tables and bins by hand, predictions against the metrics of the loss."""

from __future__ import annotations

import math

import pytest
import torch

from nest_fn import key, loss
from nest_fn.analysis import codes
from tests.analysis.models import small_batch, small_model


def test_use_and_drift() -> None:
    counts = torch.tensor([[4, 4, 0, 0], [8, 0, 0, 0]])
    found = codes.usage(counts)
    assert found.perplexity.tolist() == pytest.approx([2.0, 1.0])
    assert found.used.tolist() == pytest.approx([0.5, 0.25])
    assert found.largest.tolist() == pytest.approx([0.5, 1.0])
    times = torch.tensor([[[1, 0]], [[0, 5]], [[0, 7]]])
    assert codes.drift(times)[:, 0].tolist() == pytest.approx([math.log(2), 0.0])


def test_purity_by_hand() -> None:
    """Codes 0 and 1 are phone a, code 2 is b twice and a once."""
    labels = torch.tensor([0, 0, 1, 1, 0, -1])
    found_table = codes.contingency(labels, torch.tensor([0, 1, 2, 2, 2, 0]), 2, 3)
    assert found_table.tolist() == [[1, 1, 1], [0, 0, 2]]
    found = codes.purity(found_table)
    assert found.phone == pytest.approx(4 / 5)
    assert found.cluster == pytest.approx(3 / 5)
    conditional = 3 / 5 * (-(1 / 3) * math.log(1 / 3) - 2 / 3 * math.log(2 / 3))
    entropy = -(3 / 5) * math.log(3 / 5) - 2 / 5 * math.log(2 / 5)
    assert found.pnmi == pytest.approx((entropy - conditional) / entropy)
    assert codes.purity(torch.eye(3, dtype=torch.int64)).pnmi == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no frame"):
        codes.purity(torch.zeros(2, 3, dtype=torch.int64))


def test_confusions_are_counted() -> None:
    targets, predicted = torch.tensor([1, 1, 1, 2, 3]), torch.tensor([2, 2, 1, 3, 3])
    assert codes.confusions(targets, predicted) == [(1, 2, 2), (2, 3, 1)]
    assert codes.confusions(targets, predicted, most=1) == [(1, 2, 2)]


def test_places_in_blocks() -> None:
    masked = torch.tensor([[False, True, True, True, False, True], [True, True, False, False, False, False]])
    found = codes.masked_blocks(masked)
    assert found.position.tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert found.length.tolist() == [[0, 3, 3, 3, 0, 1], [2, 2, 0, 0, 0, 0]]
    assert found.distance.tolist() == [[0, 1, 2, 1, 0, 1], [1, 1, 0, 0, 0, 0]]


def test_bins() -> None:
    values = torch.tensor([0.0, 1.0, 1.5, 9.0, -1.0])
    found = codes.by_bins(values, torch.tensor([True, False, True, True, True]), values.abs(), [0, 1, 2, 3])
    assert found.tokens.tolist() == [1, 2, 0]
    assert found.accuracy[:2].tolist() == [1.0, 0.5]
    assert found.loss[:2].tolist() == [0.0, 1.25]
    assert bool(found.accuracy[2].isnan())
    with pytest.raises(ValueError, match="increase"):
        codes.by_bins(values, values, values, [1, 1])


@pytest.mark.parametrize("books", [1, 2])
def test_predictions_have_the_loss_and_accuracy_of_the_batch(books: int) -> None:
    params, state, cfg = small_model(f"num_books={books}")
    batch = small_batch()
    found = codes.predictions(params, state, batch, cfg, key=key(5))
    value, (metrics, _) = loss(params, state, batch, cfg, key=key(5), train=False)
    assert found.targets.shape[2] == books
    assert float(found.losses[found.masked].mean()) == pytest.approx(float(value))
    assert int((found.predicted == found.targets)[found.masked].sum()) == int(metrics["correct"])
