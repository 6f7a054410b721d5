"""Sums of steps to rates, against counting by hand; and the sentences about runs that look sick."""

from __future__ import annotations

import math

import pytest
import torch

from nest_fn.layers import random
from nest_fn.layers.types import Tensor
from nest_fn.train.step.metrics import SUMMED, add, skip, summarise, warnings

HEALTHY = {"masked_tokens": 5000.0, "overflow": 0.0, "perplexity": 40.0, "accuracy": 0.3, "unigram_accuracy": 0.1}


def _metrics(seed: int, books: int = 2, classes: int = 10, count: int = 200) -> dict[str, Tensor]:
    """What a step reports, counted from tokens drawn at will."""
    key = random.fold_in(random.key(1), seed)
    tokens = (random.uniform(key, (count, books)) ** 2 * classes).long()
    masked = tokens[: count // 4]
    counts = [torch.stack([part[:, k].bincount(minlength=classes) for k in range(books)]) for part in (tokens, masked)]
    return {
        "loss_sum": torch.tensor(2.0 * masked.numel() + seed), "masked_tokens": torch.tensor(masked.numel()),
        "correct": torch.tensor(7 + seed), "overflow": torch.tensor(seed), "valid_tokens": torch.tensor(count),
        "token_counts": counts[0], "masked_token_counts": counts[1], "audio_samples": torch.tensor(1000),
        "padded_samples": torch.tensor(1100), "unmasked_tokens": torch.tensor(count - masked.numel()),
        "unmasked_correct": torch.tensor(3 + seed), "grad_norm": torch.tensor(3.0 + seed), "lr": torch.tensor(0.1),
    }  # fmt: skip


def test_a_window_is_the_sum_of_its_steps() -> None:
    steps = [_metrics(seed) for seed in range(3)]
    window: dict[str, Tensor] = {}
    for step in steps:
        window = add(window, step)
    assert set(window) == {*SUMMED, "steps", "skipped", "grad_norm"}
    assert (float(window["steps"]), float(window["skipped"]), float(window["grad_norm"])) == (3, 0, 5)
    for name in SUMMED:
        assert torch.equal(window[name], torch.stack([step[name].double() for step in steps]).sum(dim=0))


def test_an_update_that_was_left_out_only_counts() -> None:
    bad = {name: torch.full_like(leaf.double(), float("nan")) for name, leaf in _metrics(1).items()}
    made = add(add({}, _metrics(0)), _metrics(2))
    for window in (
        add(skip(add({}, _metrics(0)), bad), _metrics(2)),
        skip(add(add({}, _metrics(0)), _metrics(2)), bad),
    ):
        assert summarise(window) == summarise(made) and torch.equal(window["grad_norm"], made["grad_norm"])
        assert (float(window["steps"]), float(window["skipped"])) == (3, 1)
    alone = skip({}, bad)
    assert summarise(alone)["loss"] == 0 and "grad_norm" not in alone
    assert warnings(HEALTHY | {"masked_tokens": 0.0, "skipped": 1.0}, 64, 100, 20) == {}


def test_adding_leaves_its_arguments_alone() -> None:
    window, step = add({}, _metrics(0)), _metrics(1)
    before = {name: leaf.clone() for name, leaf in (window | step).items()}
    add(window, step)
    assert all(torch.equal(leaf, before[name]) for name, leaf in (window | step).items())


def test_report_against_counting() -> None:
    step = _metrics(2)
    got = summarise(add({}, step))
    counts, masked = step["token_counts"].double(), step["masked_token_counts"]
    shares = [row[row > 0] / row.sum() for row in counts]
    assert got["loss"] == pytest.approx(2.0 + 2 / 100) and got["accuracy"] == pytest.approx(9 / 100)
    assert got["unigram_accuracy"] == pytest.approx(sum(int(row.max()) for row in masked) / 100)
    assert got["masked_share"] == pytest.approx(0.25) and got["masked_tokens"] == 100 and got["overflow"] == 2
    assert got["coverage"] == pytest.approx(sum(int((row > 0).sum()) for row in counts) / 20)
    perplexity = [math.exp(-sum(p * math.log(p) for p in share.tolist())) for share in shares]
    assert got["perplexity"] == pytest.approx(sum(perplexity) / 2)


def test_a_window_without_masked_tokens_is_finite() -> None:
    empty = {name: torch.zeros_like(value) for name, value in _metrics(0).items()}
    assert all(math.isfinite(value) for value in summarise(add({}, empty)).values())


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("unmasked", {"masked_tokens": 0.0}, "no token was masked"),
        ("overflow", {"overflow": 3.0}, "3 masked tokens were left out.*loss.capacity"),
        ("collapse", {"perplexity": 3.1}, r"few codes \(perplexity 3.1 of 64\)"),
        ("unlearnt", {"accuracy": 0.104}, r"masked accuracy 0.104 is not above.*\(0.100\)"),
    ],
)
def test_sick_runs_are_told_in_words(kind: str, change: dict[str, float], words: str) -> None:
    import re

    assert warnings(HEALTHY, 64, 100, 20) == {}
    found = warnings(HEALTHY | change, 64, 100, 20)
    assert list(found) == [kind] and re.search(words, found[kind])


def test_no_warning_before_there_is_evidence() -> None:
    poor = HEALTHY | {"accuracy": 0.1, "perplexity": 2.0}
    assert "unlearnt" not in warnings(poor, 64, 20, 20)  # in warm-up
    assert warnings(poor | {"masked_tokens": 100.0}, 64, 100, 20) == {}
